package passthrough

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// FuzzRequest sends one request to a device with a directory, after which the device
// works as before and nothing outside was touched. Node 1 is the directory, 2 a file
// in it, 3 a directory, 4 a link to the outside; handle 1 is the file's, 2 the
// directory's.
func FuzzRequest(f *testing.F) {
	for op, body := range map[uint32][]byte{
		opLookup: text(nil, "link"), opGetattr: make([]byte, 16), opSetattr: make([]byte, 88), opReadlink: nil, opSymlink: text(nil, "new", "../outside"),
		opMknod: text(vhosttest.U32(0o100644, 0, 0, 0), "new"), opMkdir: text(vhosttest.U32(0o755, 0), "new"), opUnlink: text(nil, "file"), opRmdir: text(nil, "dir"),
		opRename: text(vhosttest.U64(3), "file", "new"), opRename2: text(vhosttest.U64(3, 2), "file", "new"), opLink: text(vhosttest.U64(2), "new"),
		opOpen: vhosttest.U32(2, 0), opRead: vhosttest.U64(1, 0, 100, 0, 0), opWrite: append(vhosttest.U64(1, 0, 4, 0, 0), "data"...), opStatfs: nil,
		opRelease: vhosttest.U64(1, 0, 0), opFsync: vhosttest.U64(1, 0), opSetxattr: text(vhosttest.U32(5, 0), "user.x", "value"), opGetxattr: text(vhosttest.U32(100, 0), "user.x"),
		opListxattr: vhosttest.U32(100, 0), 24: text(nil, "user.x"), opFlush: vhosttest.U64(1, 0, 0), opInit: vhosttest.U32(7, 38, 0, 0), opOpendir: make([]byte, 8),
		opReaddir: vhosttest.U64(2, 0, 1000, 0, 0), opReleasedir: vhosttest.U64(2, 0, 0), opAccess: make([]byte, 8), opDestroy: nil, opForget: vhosttest.U64(1),
		opCreate: text(vhosttest.U32(2, 0o644, 0, 0), "new"), opBatchForget: append(vhosttest.U32(2, 0), vhosttest.U64(2, 1, 3, 1)...), opFallocate: vhosttest.U64(1, 0, 4096, 0),
		opReaddirplus: vhosttest.U64(2, 0, 1000, 0, 0), opLseek: vhosttest.U64(1, 0, 3), opCopy: vhosttest.U64(1, 0, 2, 1, 100, 5, 0), opSyncfs: make([]byte, 8),
		39: make([]byte, 40), 51: text(make([]byte, 16), "/"), 52: make([]byte, 24),
	} {
		for node := range uint64(5) {
			f.Add(op, node, uint32(0), body, uint16(1000))
		}
	}
	f.Fuzz(func(t *testing.T, op uint32, node uint64, user uint32, body []byte, room uint16) {
		a := newArena(t)
		must(t, os.WriteFile(a.path("file"), []byte("content"), 0o644), os.Mkdir(a.path("dir"), 0o755), os.Symlink("../outside/file", a.path("link")))
		g := bootDir(t, a.share, Options{XAttr: true})
		file, dir := g.find("file"), g.find("dir")
		g.find("link")
		if _, errno := g.open(file, 2); errno != 0 {
			t.Fatal(errno)
		}
		if _, errno := g.call(opOpendir, dir, make([]byte, 8), 16); errno != 0 {
			t.Fatal(errno)
		}
		msg := append(make([]byte, headerSize), body[:min(len(body), 1<<20)]...)
		le := binary.LittleEndian
		le.PutUint32(msg[4:], op)
		le.PutUint64(msg[16:], node)
		le.PutUint32(msg[24:], user)
		le.PutUint32(msg[28:], user)
		if room >= replySize {
			_, _ = g.send(msg, int(room)) // any answer will do that fits
		}
		a.intact()
		g.init()
		if _, _, errno := g.create(1, "after"); errno != 0 {
			t.Fatal("the device does not work any more", errno)
		}
	})
}
