package convert_test

import (
	"archive/tar"
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/convert"
)

func names(plain []byte) []string {
	var list []string
	walk(plain, func(h *tar.Header, _ []byte) { list = append(list, strings.TrimSuffix(h.Name, "/")) })
	return list
}

// profiled is a layer with everything that decides what may change places.
func profiled() []byte {
	t := torture.NewTar()
	t.Dir("usr")
	t.Dir("usr/bin")
	t.File("usr/bin/a", "a")
	t.Random("usr/bin/b", 3000)
	t.File("etc/c", "its directory has no entry")
	t.File("target", "x")
	t.Link("usr/link", "./target")
	t.Link("usr/link2", "usr/link")
	t.File("twice", "first")
	t.Link("of-twice", "twice")
	t.File("twice", "second")
	t.Symlink("sym", "usr")
	t.File("sym/through", "x")
	t.Dir("opaque")
	t.File("opaque/.wh..wh..opq", "")
	t.File("opaque/new", "x")
	t.File(".wh.gone", "")
	t.File("gone", "back")
	t.File("last", "x")
	return t.Bytes()
}

func TestProfile(t *testing.T) {
	profile := []string{
		"/usr/bin/b", "./etc/c", "usr/link2", "last", "usr/bin/b",
		"absent", "twice", "of-twice", "sym/through", "opaque/new", ".wh.gone", "gone", "../x", "",
	}
	first := []string{"usr", "usr/bin", "usr/bin/b", "etc/c", "target", "usr/link", "usr/link2", "last", ".prefetch.landmark"}
	source := profiled()
	want := slices.DeleteFunc(names(source), func(n string) bool { return slices.Contains(first, n) })
	want = append(slices.Clone(first), want...)
	for name, f := range formats {
		t.Run(name, func(t *testing.T) {
			r := layer(t, source, convert.Options{Format: f, Profile: profile, Pack: map[bool]int64{true: 1 << 20}[f != convert.ZstdChunked]})
			if !slices.Equal(r.Missing, profile[5:]) {
				t.Errorf("missing %q", r.Missing)
			}
			got := names(unpack(t, r))
			if f == convert.EStargz {
				got = got[:len(got)-1] // the TOC
			}
			if !slices.Equal(got, want) {
				t.Errorf("order\n%q, want\n%q", got, want)
			}
			again := layer(t, unpack(t, r), convert.Options{Format: f, Profile: profile})
			if !slices.Equal(names(unpack(t, again)), names(unpack(t, r))) {
				t.Error("what has this order already gets another")
			}
			if f != convert.ZstdChunked {
				checkLandmark(t, r)
			}
		})
	}
}

// checkLandmark holds that what comes first ends where the landmark's member
// begins, packed or not.
func checkLandmark(t *testing.T, r result) {
	t.Helper()
	e := openStargz(t, r)
	mark, ok := e.Lookup(".prefetch.landmark")
	if !ok || mark.InnerOffset != 0 {
		t.Fatalf("landmark %+v", mark)
	}
	for _, name := range []string{"usr/bin/b", "etc/c", "target", "last"} {
		if f, ok := e.Lookup(name); !ok || f.Offset >= mark.Offset {
			t.Errorf("%s is behind the landmark", name)
		}
	}
	if f, ok := e.Lookup("usr/bin/a"); !ok || f.Offset < mark.Offset {
		t.Error("usr/bin/a is before the landmark")
	}
}

// TestProfileOfNothing holds that a profile of another layer changes nothing.
func TestProfileOfNothing(t *testing.T) {
	for name, f := range formats {
		plain := layer(t, profiled(), convert.Options{Format: f})
		r := layer(t, profiled(), convert.Options{Format: f, Profile: []string{"not/there"}})
		if !bytes.Equal(r.blob, plain.blob) || !slices.Equal(r.Missing, []string{"not/there"}) {
			t.Errorf("%s: another blob, missing %q", name, r.Missing)
		}
	}
}

// TestProfileNeedsFile has a tar that can be read once only.
func TestProfileNeedsFile(t *testing.T) {
	_, err := convert.Layer(t.Context(), bytes.NewBuffer(profiled()), &bytes.Buffer{}, convert.Options{Format: convert.EStargz, Profile: []string{"last"}})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "read twice") {
		t.Errorf("error %v", err)
	}
}
