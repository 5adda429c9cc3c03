package credentials

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
)

const (
	// programTimeout is as long as the kubelet lets a provider run.
	programTimeout = time.Minute
	// killWait is how long children of a program that was killed may keep its
	// output open.
	killWait = time.Second
	// maxAnswer bounds the answer of a program in bytes.
	maxAnswer = 1 << 20
)

// Program is a helper that reads a question and writes an answer. What it writes
// to its error output is dropped: it may hold secrets.
type Program struct {
	Path string // or a name to be found in PATH
	Args []string
	Env  []string // beside that of this process
}

// Run returns what the program wrote, also when it failed.
func (p Program) Run(ctx context.Context, input []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Path, p.Args...)
	out := &bounded{}
	cmd.Stdin, cmd.Stdout = bytes.NewReader(input), out
	cmd.Env = append(os.Environ(), p.Env...)
	cmd.WaitDelay = killWait
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("no answer in time: %w", ctx.Err())
	case out.full:
		return nil, errLong
	}
	return out.buf.Bytes(), err
}

var errLong = fmt.Errorf("its answer is longer than %d bytes", maxAnswer)

// bounded is a buffer for maxAnswer bytes.
type bounded struct {
	buf  bytes.Buffer
	full bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.full = b.full || b.buf.Len()+len(p) > maxAnswer; b.full {
		return 0, errors.New("too long")
	}
	return b.buf.Write(p)
}
