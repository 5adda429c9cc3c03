package passthrough

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inUseGuest and inUseHost say, in the environment of a process of its own, where the guest's and the
// node's directory are: this one could not serve itself while it waits for a page.
const inUseGuest, inUseHost = "TATAMI_TEST_GUEST", "TATAMI_TEST_HOST"

// What programs do with files that are open, mapped and replaced at the same time, in
// the guest's page cache and on the node.
func TestFilesInUse(t *testing.T) {
	if guest := os.Getenv(inUseGuest); guest != "" {
		useFiles(t, os.Getenv(inUseHost), guest)
		return
	}
	for _, cache := range []Cache{CacheAuto, CacheAlways} {
		t.Run(string(cache), func(t *testing.T) {
			host, guest := mount(t, Options{Cache: cache}, 0)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestFilesInUse$")
			cmd.Env = append(os.Environ(), inUseGuest+"="+guest, inUseHost+"="+host)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

func useFiles(t *testing.T, host, guest string) {
	on := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(host, "f")); err != nil || string(b) != want {
			t.Errorf("on the node: %q, %v; want %q", b, err, want)
		}
	}
	path := filepath.Join(guest, "f")
	must(t, os.WriteFile(path, []byte("0123456789"), 0o644))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	b, err := unix.Mmap(int(f.Fd()), 0, 10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	copy(b[2:], "MAP")
	must(t, unix.Msync(b, unix.MS_SYNC))
	on("01MAP56789")
	end, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = end.WriteString("end")
	must(t, err)
	on("01MAP56789end")
	copy(b, "AGAIN") // a dirty page, behind which the file grows
	_, err = end.WriteString("more")
	must(t, err, unix.Msync(b, unix.MS_SYNC))
	on("AGAIN56789endmore")

	link := filepath.Join(guest, "link")
	must(t, os.Link(path, link))
	if st, err := f.Stat(); err != nil || st.Sys().(*syscall.Stat_t).Nlink != 2 {
		t.Errorf("links: %v, %v", st, err)
	}
	must(t, os.WriteFile(path+".new", []byte("new"), 0o644), os.Rename(path+".new", path), os.Remove(link))
	on("new")
	copy(b[5:], "still") // the old one has no name any more
	must(t, unix.Msync(b, unix.MS_SYNC), f.Truncate(8), f.Chmod(0o600))
	got := make([]byte, 20)
	if n, _ := f.ReadAt(got, 0); string(got[:n]) != "AGAINsti" { // io.EOF
		t.Errorf("a file without a name: %q", got[:n])
	}
	must(t, unix.Munmap(b), end.Close(), f.Close())
	f, err = os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	must(t, err)
	on("")
	must(t, f.Close())
}
