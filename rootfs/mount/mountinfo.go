package mount

import (
	"fmt"

	"github.com/moby/sys/mountinfo"
)

// mountTable maps a directory to what is mounted on top there.
type mountTable map[string]*mountinfo.Info

func readMounts() (mountTable, error) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read the kernel's mount table: %w", err)
	}
	t := make(mountTable, len(all))
	for _, i := range all {
		t[i.Mountpoint] = i // later ones cover earlier ones
	}
	return t, nil
}

func (t mountTable) has(path string) bool { return t[path] != nil }

// holds tells whether a record's own mount is at its target.
func (t mountTable) holds(r *Record) bool {
	i := t[r.Target]
	return i != nil && i.ID == r.MountID && deviceOf(i) == r.Device
}

func deviceOf(i *mountinfo.Info) string { return fmt.Sprintf("%d:%d", i.Major, i.Minor) }
