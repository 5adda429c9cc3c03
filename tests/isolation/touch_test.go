package isolation

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// touchJob is a page of a file, which is read by a fault.
type touchJob struct {
	File string
	At   int64
}

// touchResult is how long it took, in nanoseconds; Error is empty when it went well.
type touchResult struct {
	Took  int64
	Error string
}

// touchEach answers jobs one after the other until there are no more.
func touchEach(d *json.Decoder) error {
	out := json.NewEncoder(os.Stdout)
	for {
		var job touchJob
		if err := d.Decode(&job); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := out.Encode(job.run()); err != nil {
			return err
		}
	}
}

func (j touchJob) run() (r touchResult) {
	f, err := os.Open(j.File)
	if err != nil {
		return touchResult{Error: err.Error()}
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), j.At, page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return touchResult{Error: err.Error()}
	}
	defer func() { _ = unix.Munmap(mem) }() // it is mapped
	_ = unix.Madvise(mem, unix.MADV_RANDOM) // it reads more then
	began := time.Now()
	if !touch(spot{mem: mem}) {
		r.Error = "input/output error"
	}
	r.Took = int64(time.Since(began))
	return r
}

// toucher is a program of a sandbox that touches pages when it is told to.
type toucher struct {
	tb  testing.TB
	b   *sandbox
	in  *json.Encoder
	out *json.Decoder
}

func (b *sandbox) newToucher(tb testing.TB) *toucher {
	tb.Helper()
	self, err := os.Executable()
	check(tb, err)
	line := append(append([]string{}, b.prefix()...), self)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = append(os.Environ(), childKind+"=touch")
	in, err := cmd.StdinPipe()
	check(tb, err)
	out, err := cmd.StdoutPipe()
	check(tb, err)
	check(tb, cmd.Start())
	tb.Cleanup(func() {
		_ = in.Close() // it ends then
		check(tb, cmd.Wait())
	})
	return &toucher{tb, b, json.NewEncoder(in), json.NewDecoder(out)}
}

// touch reads a page and returns how long it took.
func (t *toucher) touch(name string, at int64) (time.Duration, error) {
	if err := t.in.Encode(touchJob{t.b.root + "/" + name, at}); err != nil {
		return 0, err
	}
	var r touchResult
	if err := t.out.Decode(&r); err != nil {
		return 0, err
	}
	if r.Error != "" {
		return 0, fmt.Errorf("%s at %d: %s", name, at, r.Error)
	}
	return time.Duration(r.Took), nil
}
