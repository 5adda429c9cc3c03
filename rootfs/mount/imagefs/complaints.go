package imagefs

import (
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// complainEvery is how often one kind of error of one file is logged.
const complainEvery = time.Minute

// complaints logs failed reads without flooding the log: a dead registry fails
// thousands of reads a second.
type complaints struct {
	log *slog.Logger
	now func() time.Time

	mu   sync.Mutex
	seen map[complaint]*complaintCount
}

type complaint struct{ file, class string }

type complaintCount struct {
	logged  time.Time
	skipped int
}

func (c *complaints) add(file, reference string, off int64, n int, err error) {
	key := complaint{file, errorClass(err)}
	now := c.now()
	c.mu.Lock()
	count := c.seen[key]
	if count == nil {
		count = &complaintCount{}
		c.seen[key] = count
	} else if now.Sub(count.logged) < complainEvery {
		count.skipped++
		c.mu.Unlock()
		return
	}
	skipped := count.skipped
	*count = complaintCount{logged: now}
	c.mu.Unlock()
	c.log.Error("read of image failed; the reader gets EIO and may try again",
		"reference", reference, "file", file, "off", off, "n", n, "class", key.class, "not_logged", skipped, "err", err)
}

// forget drops what is known of a file that is gone.
func (c *complaints) forget(file string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range c.seen {
		if key.file == file {
			delete(c.seen, key)
		}
	}
}

func errorClass(err error) string {
	switch {
	case errdefs.IsUnavailable(err):
		return "unavailable"
	case errdefs.IsDataLoss(err):
		return "data loss"
	case errdefs.IsNotFound(err):
		return "not found"
	case errdefs.IsPermissionDenied(err), errdefs.IsUnauthorized(err):
		return "permission denied"
	case errdefs.IsDeadlineExceeded(err):
		return "timeout"
	}
	return "other"
}
