package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// serve sends an object or the range of it that was asked for.
func (r *Relay) serve(w http.ResponseWriter, req *http.Request, image Image, kind string, desc ocispec.Descriptor) error {
	h := w.Header()
	h.Set("Accept-Ranges", "bytes")
	off, n, partial, err := parseRange(req.Header.Values("Range"), desc.Size)
	if err != nil {
		h.Set("Content-Range", fmt.Sprintf("bytes */%d", desc.Size))
		return err
	}
	status := http.StatusOK
	if partial {
		status = http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, desc.Size))
	}
	h.Set("Content-Type", desc.MediaType)
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	h.Set("Docker-Content-Digest", desc.Digest.String())
	h.Set("ETag", `"`+desc.Digest.String()+`"`)
	if req.Method == http.MethodHead || n == 0 {
		w.WriteHeader(status)
		return nil
	}
	err = r.stream(req.Context(), w, status, func() (io.ReadCloser, error) {
		return image.Open(req.Context(), kind, desc.Digest, off, n)
	}, n)
	if err != nil {
		clearBody(h)
		return fmt.Errorf("send %s/%s [%d,%d): %w", kind, desc.Digest, off, off+n, err)
	}
	return nil
}

// clearBody takes back what was said of a body that will not come.
func clearBody(h http.Header) {
	for _, key := range []string{"Content-Range", "Content-Length", "Docker-Content-Digest", "ETag", "Accept-Ranges"} {
		h.Del(key)
	}
}

// stream copies n bytes to the guest. The status is sent when the first of
// them are there, so that a source that is down is still an error answer.
func (r *Relay) stream(ctx context.Context, w http.ResponseWriter, status int, open func() (io.ReadCloser, error), n int64) error {
	body, err := open()
	if err != nil {
		return err
	}
	defer body.Close()
	buf := r.pool.Get().(*[piece]byte)
	defer r.pool.Put(buf)
	for begun := false; n > 0; begun = true {
		m, err := read(body, buf[:min(n, piece)])
		if err != nil && begun {
			return broken(err)
		}
		if err != nil {
			return err
		}
		if !begun {
			w.WriteHeader(status)
		}
		if err := r.deadline(w); err != nil {
			return broken(err)
		}
		if _, err := w.Write(buf[:m]); err != nil {
			return broken(err)
		}
		r.cfg.Sent.Add(int64(m))
		n -= int64(m)
		if err := ctx.Err(); err != nil && n > 0 {
			return broken(err)
		}
	}
	return nil
}

// read returns at least one byte or an error.
func read(r io.Reader, p []byte) (int, error) {
	n, err := io.ReadAtLeast(r, p, 1)
	if n > 0 {
		return n, nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return 0, err
}

// parseRange reads a Range header (RFC 9110, section 14.2) of an object of size
// bytes. Several ranges, which the specification lets a server ignore, and
// malformed ones are refused: ignoring them would send the whole object.
func parseRange(header []string, size int64) (off, n int64, partial bool, err error) {
	if len(header) == 0 {
		return 0, size, false, nil
	}
	malformed := &failure{http.StatusBadRequest, "RANGE_INVALID", "give one range: bytes=first-last, bytes=first- or bytes=-length"}
	spec, ok := strings.CutPrefix(header[0], "bytes=")
	first, last, dash := strings.Cut(spec, "-")
	if !ok || !dash || len(header) > 1 || (first == "" && last == "") {
		return 0, 0, false, malformed
	}
	a, okA := number(first, 0)
	b, okB := number(last, size-1)
	if !okA || !okB || (first != "" && last != "" && b < a) {
		return 0, 0, false, malformed
	}
	if first == "" {
		a, b = max(0, size-b), size-1 // the last b bytes
	}
	if a >= size {
		return 0, 0, false, &failure{http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID",
			fmt.Sprintf("the range begins behind the end (%d bytes)", size)}
	}
	return a, min(b, size-1) - a + 1, true, nil
}

// number parses decimal digits only; empty is absent.
func number(s string, absent int64) (int64, bool) {
	if s == "" {
		return absent, true
	}
	v, err := strconv.ParseUint(s, 10, 63)
	return int64(v), err == nil
}
