package isolation

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// childKind is the variable of the environment that makes this program one of those that
// run in sandboxes. Its job comes as JSON on stdin, whose end ends it; what it found goes
// to stdout.
const childKind = "TATAMI_ISOLATION_CHILD"

// childMain is the main function of such a program; it returns the exit code.
func childMain(kind string) int {
	d := json.NewDecoder(os.Stdin)
	stop := make(chan struct{})
	var out any
	var err error
	switch kind {
	case "probe":
		var job probeJob
		if err = d.Decode(&job); err == nil {
			go untilEnd(stop)
			out, err = job.run(stop)
		}
	case "read":
		var job readJob
		if err = d.Decode(&job); err == nil {
			out = job.run()
		}
	case "touch":
		err = touchEach(d)
	case "spin":
		var job spinJob
		if err = d.Decode(&job); err == nil {
			go untilEnd(stop)
			out = job.run(stop)
		}
	default:
		err = fmt.Errorf("no such program: %q", kind)
	}
	if err == nil && out != nil {
		err = json.NewEncoder(os.Stdout).Encode(out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// untilEnd closes stop when stdin ends.
func untilEnd(stop chan<- struct{}) {
	_, _ = io.Copy(io.Discard, os.Stdin) // an error is an end, too
	close(stop)
}

// child is such a program, running.
type child struct {
	kind   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout bytes.Buffer
	stderr bytes.Buffer
}

// spawn starts one with a job; prefix goes before its command line.
func spawn(tb testing.TB, kind string, prefix []string, job any) *child {
	tb.Helper()
	c, err := newChild(kind, prefix, job)
	check(tb, err)
	tb.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			_ = c.cmd.Process.Kill() // the test has failed
			_ = c.cmd.Wait()
		}
	})
	return c
}

func newChild(kind string, prefix []string, job any) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	line := append(append([]string{}, prefix...), self)
	c := &child{kind: kind, cmd: exec.Command(line[0], line[1:]...)}
	c.cmd.Env = append(os.Environ(), childKind+"="+kind)
	c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	return c, json.NewEncoder(c.stdin).Encode(job)
}

// read has a program in the sandbox read files, and returns when it has.
func (b *sandbox) read(names []string) (r readResult, err error) {
	c, err := newChild("read", b.prefix(), readJob{Files: b.files(names)})
	if err == nil {
		err = c.wait(&r)
	}
	return r, err
}

// stop tells the program to end and reads what it found into out.
func (c *child) stop(out any) error {
	_ = c.stdin.Close() // it may have ended by itself
	return c.wait(out)
}

// wait waits until the program has ended by itself.
func (c *child) wait(out any) error {
	if err := c.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w\n%s", c.kind, err, c.stderr.String())
	}
	if err := json.Unmarshal(c.stdout.Bytes(), out); err != nil {
		return fmt.Errorf("%s: %w: %q", c.kind, err, c.stdout.String())
	}
	return nil
}

// readJob reads files one after the other, in the order given.
type readJob struct {
	Files []string
}

// readResult is what came of it. Times are in seconds.
type readResult struct {
	Bytes  int64
	Errors []string
	Ended  int64 // unix time, nanoseconds
}

func (j readJob) run() (r readResult) {
	buf := make([]byte, 256<<10)
	for _, name := range j.Files {
		n, err := readFile(name, buf)
		r.Bytes += n
		if err != nil {
			r.Errors = append(r.Errors, err.Error())
		}
	}
	r.Ended = now()
	return r
}

func readFile(name string, buf []byte) (n int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for {
		k, err := f.Read(buf)
		n += int64(k)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}
