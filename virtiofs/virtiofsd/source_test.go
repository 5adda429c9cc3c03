package virtiofsd

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/virtiofs/nydusapi"
)

// Who has a directory of an image cannot go up from it, nor change it.
func TestNoWayUp(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts")
	}
	above := t.TempDir()
	dir := filepath.Join(above, "image")
	must(t, os.Mkdir(dir, 0o755))
	f, err := (&sources{}).open(nydusapi.RAFS, dir)
	must(t, err)
	defer f.Close()
	var want, got unix.Stat_t
	must(t, unix.Stat(dir, &want))
	for _, up := range []string{".", "..", "../..", "../../../../../.."} {
		must(t, unix.Fstatat(int(f.Fd()), up, &got, 0))
		if got.Ino != want.Ino || got.Dev != want.Dev {
			t.Errorf("%s leads elsewhere", up)
		}
	}
	if err := unix.Mkdirat(int(f.Fd()), "new", 0o755); !errors.Is(err, unix.EROFS) {
		t.Errorf("make a directory: %v", err)
	}
}
