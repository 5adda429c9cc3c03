package vsock

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// maxLine bounds a line of the hybrid protocol in bytes, its newline included:
// "CONNECT 4294967295\n" with room for careless spacing.
const maxLine = 32

// ReadConnect reads "CONNECT <port>\n" from a client of the hybrid protocol and
// not one byte more. Kata's clients write the word in either case.
func ReadConnect(r io.Reader) (port uint32, err error) {
	line, err := readLine(r)
	if err != nil {
		return 0, fmt.Errorf("read CONNECT: %w", err)
	}
	return parseCommand(line, "CONNECT")
}

// WriteOK accepts a client of the hybrid protocol; port is the one that the
// connection got on the node's side.
func WriteOK(w io.Writer, port uint32) error {
	if _, err := fmt.Fprintf(w, "OK %d\n", port); err != nil {
		return fmt.Errorf("write OK: %w", err)
	}
	return nil
}

// connect is the client's half.
func connect(rw io.ReadWriter, port uint32) error {
	if _, err := fmt.Fprintf(rw, "CONNECT %d\n", port); err != nil {
		return err
	}
	line, err := readLine(rw)
	if errors.Is(err, io.EOF) {
		return errRefused
	}
	if err != nil {
		return err
	}
	_, err = parseCommand(line, "OK")
	return err
}

func parseCommand(line, word string) (uint32, error) {
	f := strings.Fields(line)
	if len(f) != 2 || !strings.EqualFold(f[0], word) {
		return 0, fmt.Errorf("line %q instead of %s <port>", line, word)
	}
	return parsePort(f[1])
}

// readLine reads byte by byte: what follows the line belongs to the stream, and
// the stream must stay the bare socket so that splice and sendfile work on it.
func readLine(r io.Reader) (string, error) {
	var line [maxLine]byte
	for n := range line {
		if _, err := io.ReadFull(r, line[n:n+1]); err != nil {
			return "", err
		}
		if line[n] == '\n' {
			return string(line[:n]), nil
		}
	}
	return "", fmt.Errorf("line of more than %d bytes", maxLine)
}
