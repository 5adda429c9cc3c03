package virtiofs

import (
	"bytes"
	"testing"

	"github.com/containerd/errdefs"
)

// A second device goes on where the first one was: the same session, the same ids.
func TestSessionGoesOn(t *testing.T) {
	d := NewDirectory()
	if err := d.AddAs(77, "image", good(5000)); err != nil {
		t.Fatal(err)
	}
	began := make(chan []byte, 1)
	first := initialized(t, Config{Directory: d, Began: func(init []byte) { began <- bytes.Clone(init) }})
	session := <-began
	node, _, errno := first.lookup("image")
	if errno != 0 || node != 77 || session == nil {
		t.Fatalf("node %d, %v; session %x", node, errno, session)
	}
	second := start(t, Config{Directory: d, Session: session})
	if b, errno := second.read(node, 100, 200); errno != 0 || !bytes.Equal(b, contents(100, 200)) {
		t.Errorf("read: %d bytes, %v", len(b), errno)
	}
	if node, _, errno := second.lookup("image"); errno != 0 || node != 77 {
		t.Errorf("node %d, %v", node, errno)
	}
	if s, err := New(Config{Directory: d, Session: session[:20]}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("half a session: %v, %v", s, err)
	}
}

func TestAddAs(t *testing.T) {
	d := NewDirectory()
	for _, tc := range []struct {
		id   uint64
		name string
		good bool
	}{{9, "a", true}, {9, "b", false}, {10, "a", false}, {1, "b", false}, {1 << 48, "b", false}, {1<<48 - 1, "b", true}, {5, "c", true}} {
		if err := d.AddAs(tc.id, tc.name, good(1)); (err == nil) != tc.good {
			t.Errorf("%s as %d: %v", tc.name, tc.id, err)
		}
	}
	if n := d.named("c"); n == nil || n.id != 5 {
		t.Errorf("%+v", n)
	}
}
