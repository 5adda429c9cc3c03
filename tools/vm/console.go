package vm

import (
	"bytes"
	"io"
	"strings"
	"sync"
)

// consoleSize is how much of a console is kept, in bytes.
const consoleSize = 64 << 10

// console keeps the end of what the guest and QEMU wrote.
type console struct {
	copy io.Writer // may be nil

	mu   sync.Mutex
	tail []byte // at most 2*consoleSize
}

// Write implements io.Writer. It never fails: a copy that does is given up.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tail = append(c.tail, p[max(0, len(p)-consoleSize):]...)
	if len(c.tail) > 2*consoleSize {
		c.tail = append(c.tail[:0], c.tail[len(c.tail)-consoleSize:]...)
	}
	if c.copy != nil {
		if _, err := c.copy.Write(p); err != nil {
			c.copy = nil
		}
	}
	return len(p), nil
}

// String is what was kept, at most consoleSize bytes, without carriage returns.
func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.tail[max(0, len(c.tail)-consoleSize):]
	return string(bytes.ReplaceAll(b, []byte("\r"), nil))
}

// lastLines is the end of s for an error message.
func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
