package vsock

import (
	"io"
	"strings"
	"testing"
)

func TestReadConnect(t *testing.T) {
	for _, in := range []string{"CONNECT 1024\n", "connect 1024\n", "Connect  1024 \r\n"} {
		r := strings.NewReader(in + "rest")
		port, err := ReadConnect(r)
		if err != nil || port != 1024 {
			t.Errorf("%q: port %d, %v", in, port, err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != "rest" {
			t.Errorf("%q: left %q of the stream", in, rest)
		}
	}
}

func TestReadConnectRefuses(t *testing.T) {
	for _, in := range []string{
		"", "CONNECT 1024", "CONNECT\n", "CONNECT x\n", "CONNECT -1\n", "CONNECT 4294967296\n",
		"CONNECT 1 2\n", "GET / HTTP/1.1\n", "\n", strings.Repeat(" ", 64) + "\n",
	} {
		if port, err := ReadConnect(strings.NewReader(in)); err == nil {
			t.Errorf("%q: accepted, port %d", in, port)
		}
	}
}

func FuzzReadConnect(f *testing.F) {
	for _, s := range []string{"CONNECT 1\n", "connect 4294967294\n", "OK 1\n", "CONNECT"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r := strings.NewReader(s)
		if _, err := ReadConnect(r); err != nil {
			return
		}
		if used := len(s) - r.Len(); s[used-1] != '\n' || strings.Contains(s[:used-1], "\n") {
			t.Fatalf("%q: read %d bytes", s, used)
		}
	})
}
