package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"slices"
	"time"

	"github.com/tatami-containers/tatami/tools/run"
)

// guestMemory of every machine, in MiB: a full pull unpacks into half of it.
const guestMemory = 512

// patience bounds a step of a container; nothing here takes so long.
const patience = 5 * time.Minute

// script is the container's: each line that it gets lets it read everything.
const script = `echo started
while read line; do find / -xdev -type f -exec cat {} + > /dev/null && echo "$line"; done`

// node is a fresh directory for tatami-host, with the machines of one way.
type node struct {
	way
	reg      *registry
	root     string
	before   int64 // bytes of memory
	machines []*machine
}

func newNode(w way, reg *registry) (*node, error) {
	root, err := os.MkdirTemp("", "sandboxes-")
	if err != nil {
		return nil, err
	}
	before, err := memory(root)
	return &node{way: w, reg: reg, root: root, before: before}, err
}

// machine is one with its container.
type machine struct {
	in    io.WriteCloser
	lines chan string // of the container; closed at its end
	err   error       // of its end; read when lines is closed
}

func (n *node) start(ctx context.Context) *machine {
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	m := &machine{in: in, lines: make(chan string, 8)}
	o := run.Options{Image: n.reg.image, Root: n.root, PlainHTTP: []string{n.reg.tcp}, Mode: n.mode, Source: n.source, MemoryMiB: guestMemory,
		Args: []string{"/bin/sh", "-c", script}, Stdin: stdin, Stdout: stdout, Stderr: os.Stderr, Registry: n.reg.link.Serve}
	ended := make(chan error, 1)
	go func() {
		r, err := run.Run(ctx, o)
		if err == nil && (r.ExitCode != 0 || r.Source != n.reported) {
			err = fmt.Errorf("the container ended with exit code %d, its image came from %q", r.ExitCode, r.Source)
		}
		ended <- errors.Join(err, stdin.Close())
		stdout.Close()
	}()
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			m.lines <- s.Text()
		}
		m.err = <-ended
		close(m.lines)
	}()
	return m
}

// await returns how long the line takes that is to come next.
func (m *machine) await(line string) (float64, error) {
	from := time.Now()
	select {
	case got, ok := <-m.lines:
		if !ok {
			return 0, fmt.Errorf("the container ended before it said %q: %w", line, m.err)
		}
		if got != line {
			return 0, fmt.Errorf("the container says %q, not %q", got, line)
		}
		return time.Since(from).Seconds(), nil
	case <-time.After(patience):
		return 0, fmt.Errorf("the container does not say %q in %v", line, patience)
	}
}

// read lets the container read everything, and says how long it takes.
func (m *machine) read() (float64, error) {
	if _, err := io.WriteString(m.in, "read\n"); err != nil {
		return 0, err
	}
	return m.await("read")
}

// measure starts machines one after the other, each with a container that only says
// so; then each reads. What the first one does on a node that has nothing is noted
// apart.
func (n *node) measure(ctx context.Context, f figures, counts []int) error {
	for i := range counts[len(counts)-1] {
		m := n.start(ctx)
		n.machines = append(n.machines, m)
		took, err := m.await("started")
		if err == nil && slices.Contains(counts, i+1) {
			err = n.weigh(f, machinesRow(i+1))
		}
		if err != nil {
			return err
		}
		f.note(first("first output", i), took)
		log.Printf("%s: machine %d has started", n.name, i+1)
	}
	for i, m := range n.machines {
		if err := n.read(f, i, m); err != nil {
			return err
		}
		log.Printf("%s: machine %d has read everything", n.name, i+1)
	}
	return n.weigh(f, readRow)
}

// read lets a machine read twice.
func (n *node) read(f figures, i int, m *machine) error {
	before, err := memory(n.root)
	if err != nil {
		return err
	}
	took, err := m.read()
	if err != nil {
		return err
	}
	f.note(first("reading everything", i), took)
	after, err := memory(n.root)
	if err != nil {
		return err
	}
	f.note(first(addsRow, i), mib(after-before))
	took, err = m.read()
	f.note("reading it again", took)
	return err
}

// weigh notes the host's memory.
func (n *node) weigh(f figures, row string) error {
	now, err := memory(n.root)
	f.note(row, mib(now-n.before))
	return err
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// close ends the containers, whose machines follow, and tatami-host after the last.
func (n *node) close() error {
	var errs []error
	for _, m := range n.machines {
		errs = append(errs, m.in.Close())
	}
	for _, m := range n.machines {
		for range m.lines { // until the end
		}
		errs = append(errs, m.err)
	}
	return errors.Join(append(errs, os.RemoveAll(n.root))...)
}
