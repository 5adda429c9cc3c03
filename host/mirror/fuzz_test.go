package mirror

import (
	"testing"

	"github.com/distribution/reference"
)

func FuzzParse(f *testing.F) {
	for _, s := range [][2]string{
		{"docker.io", "library/debian"}, {"", "quay.io/a/b"}, {"", "debian"}, {"127.0.0.1:5000", "a"},
		{"[::1]:5000", "a"}, {"localhost", "a"}, {"docker.io/library", "a"}, {"a.b", "c:tag"}, {"a.b", "c@sha256:00"}, {"..", ".."},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, domain, name string) {
		named, err := parse(domain, name)
		if err != nil {
			return
		}
		want := name
		if domain != "" {
			want = domain + "/" + name
		}
		if !reference.IsNameOnly(named) || domain != "" && reference.Domain(named) != domain ||
			named.Name() != want && named.Name() != "docker.io/library/"+name {
			t.Fatalf("%q %q became %s", domain, name, named)
		}
	})
}
