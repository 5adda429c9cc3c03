package passthrough

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// A listing goes on at the right place while files of the directory are removed, by
// the node or by the guest.
func TestListWhileFilesGo(t *testing.T) {
	const all = 10_000
	host, guest := mount(t, Options{}, 0)
	must(t, os.Mkdir(filepath.Join(host, "d"), 0o755))
	name := func(i int) string { return fmt.Sprintf("file-%d", i) }
	for i := range all {
		must(t, os.WriteFile(filepath.Join(host, "d", name(i)), nil, 0o644))
	}
	for _, remover := range []string{host, guest} {
		seen := map[string]int{}
		d, err := os.Open(filepath.Join(guest, "d"))
		must(t, err)
		for i := 0; ; {
			names, err := d.Readdirnames(100)
			if err != nil {
				break // the end
			}
			for _, n := range names {
				seen[n]++
			}
			for end := i + all/50; i < min(end, all); i++ {
				if i%4 != 0 { // may be gone already
					_ = os.Remove(filepath.Join(remover, "d", name(i)))
				}
			}
		}
		must(t, d.Close())
		for i := 0; i < all; i += 4 {
			if n := seen[name(i)]; n != 1 {
				t.Fatalf("removed from %s: %s, which stays, is listed %d times", filepath.Base(remover), name(i), n)
			}
		}
		for i := range all { // for the next one
			if i%4 != 0 {
				must(t, os.WriteFile(filepath.Join(host, "d", name(i)), nil, 0o644))
			}
		}
	}
	must(t, os.RemoveAll(filepath.Join(guest, "d")))
}
