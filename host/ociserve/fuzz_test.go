package ociserve

import (
	"net/http"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

func FuzzRange(f *testing.F) {
	for _, s := range []string{"bytes=0-1", "bytes=-5", "bytes=7-", "bytes=9-1", "bytes=-0", "x"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		off, n, partial, err := parseRange([]string{header}, size)
		if err != nil {
			return
		}
		if !partial || off < 0 || n < 1 || off > size-n {
			t.Fatalf("%q of %d: [%d,+%d) %v", header, size, off, n, partial)
		}
	})
}

func FuzzPath(f *testing.F) {
	f.Add("/v2/a/b/blobs/sha256:00")
	f.Add("/v2/manifests/manifests/manifests")
	f.Fuzz(func(t *testing.T, path string) {
		name, kind, ref, err := Split(path, Manifests, Blobs, Segments)
		if err == nil && "/v2/"+name+"/"+kind+"/"+ref != path {
			t.Fatalf("%q became %q %q %q", path, name, kind, ref)
		}
	})
}

func FuzzPriority(f *testing.F) {
	for _, s := range []string{"u=5", "i, u=7;x", "u=3,u=4", "u=8", ","} {
		f.Add(s, "u=6")
	}
	f.Fuzz(func(t *testing.T, one, two string) {
		if r := rankOf(http.Header{"Priority": {one, two}}); r > sched.Background {
			t.Fatalf("%q, %q: rank %d", one, two, r)
		}
	})
}
