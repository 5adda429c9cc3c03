package passthrough

import (
	"bytes"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// Data goes between the guest's buffers and files as it is.
func TestData(t *testing.T) {
	a := newArena(t)
	g := bootDir(t, a.share, Options{})
	node, h, errno := g.create(1, "file")
	if errno != 0 {
		t.Fatal(errno)
	}
	var want []byte
	for i, n := range []int{1, 4096, 5000, 1 << 20, 3} {
		data := strings.Repeat(string(rune('a'+i)), n)
		if errno := g.write(node, h, uint64(len(want)), data); errno != 0 {
			t.Fatalf("write %d bytes: %v", n, errno)
		}
		want = append(want, data...)
	}
	if got, err := os.ReadFile(a.path("file")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, or others, %v", len(got), len(want), err)
	}
	for _, r := range [][2]int{{0, 1}, {0, len(want)}, {5000, 100_000}, {len(want) - 3, 100}, {len(want), 10}, {1 << 40, 10}} {
		off, n := r[0], min(r[1], 1<<20)
		part := want[min(off, len(want)):min(off+n, len(want))]
		if got, errno := g.read(node, h, uint64(off), uint64(n)); errno != 0 || !bytes.Equal(got, part) {
			t.Errorf("read %v: %v, %d bytes of %d, or others", r, errno, len(got), len(part))
		}
	}
	// An appending write lands at the end, wherever the guest thinks that is.
	body := append(vhosttest.U64(h, 0, 3, 0, syscall.O_APPEND), "end"...)
	if _, errno := g.call(opWrite, node, body, 8); errno != 0 {
		t.Errorf("append: %v", errno)
	}
	if got, err := os.ReadFile(a.path("file")); err != nil || !bytes.Equal(got, append(want, "end"...)) {
		t.Errorf("after appending: %d bytes, %v", len(got), err)
	}
	for name, body := range map[string][]byte{
		"without data": vhosttest.U64(h, 0, 10, 0, 0), "more than is allowed": append(vhosttest.U64(h, 0, 1<<21, 0, 0), make([]byte, 1<<21)...),
		"cut short": vhosttest.U64(h, 0)} {
		if _, errno := g.call(opWrite, node, body, 8); errno != syscall.EINVAL {
			t.Errorf("write %s: %v", name, errno)
		}
	}
	if _, errno := g.call(opRead, node, vhosttest.U64(h, 0, 100, 0, 0), 50); errno != syscall.EINVAL {
		t.Errorf("read without room: %v", errno)
	}
	s := g.srv.Stats()
	if s.Writes != 6 || s.WriteBytes != int64(len(want))+3 || s.Reads != 6 {
		t.Errorf("stats %+v", s)
	}
}
