package layertest

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// Limits are what a format cannot keep of a tar. That names are text is a limit
// of all that are compared here.
type Limits struct {
	Seconds bool // times are rounded to seconds
	Last    bool // of a name that comes twice only the last is kept
	Order   bool // names come in another order
	// Empty says that extended attributes without a value are lost.
	Empty bool
}

// SameEntries fails the test unless l has the entries that layer.Build finds in
// the uncompressed tar, but for the format's limits.
func SameEntries(t *testing.T, l *index.Layer, tar []byte, limits Limits) {
	t.Helper()
	want, err := layer.Build(t.Context(), bytes.NewReader(tar),
		layer.Descriptor{Digest: digest.FromBytes(tar), Size: int64(len(tar))}, io.Discard, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	expected, got := limits.apply(want.Entries), limits.apply(l.Entries)
	if !limits.Order && !limits.Last && l.Table.Size != want.Table.Size {
		t.Errorf("segment of %d bytes, want %d", l.Table.Size, want.Table.Size)
	}
	if len(got) != len(expected) {
		t.Errorf("%d entries, want %d", len(got), len(expected))
	}
	if limits.Order {
		sortByName(got)
		sortByName(expected)
	}
	for i := range min(len(got), len(expected)) {
		if g, w := fmt.Sprintf("%+v", got[i]), fmt.Sprintf("%+v", expected[i]); g != w {
			t.Fatalf("entry\n got %q\nwant %q", g, w)
		}
	}
}

func sortByName(entries []index.Entry) {
	slices.SortFunc(entries, func(a, b index.Entry) int { return strings.Compare(name(a), name(b)) })
}

// name is what an entry is known by.
func name(e index.Entry) string {
	return fmt.Sprint(e.Kind >= index.Whiteout, e.Kind == index.Opaque, e.Path)
}

// apply changes entries as the format does.
func (limits Limits) apply(entries []index.Entry) []index.Entry {
	last := map[string]int{}
	for i, e := range entries {
		last[name(e)] = i
	}
	var out []index.Entry
	for i, e := range entries {
		if limits.Last && last[name(e)] != i {
			continue
		}
		if limits.Seconds {
			e.Sec, e.Nsec = time.Unix(e.Sec, int64(e.Nsec)).Round(time.Second).Unix(), 0
		}
		if limits.Order || limits.Last {
			e.Off = 0
		}
		if limits.Empty {
			e.Xattrs = slices.DeleteFunc(slices.Clone(e.Xattrs), func(x index.Xattr) bool { return x.Value == "" })
		}
		e.Path, e.Link = text(e.Path), text(e.Link)
		out = append(out, e)
	}
	return out
}

// text is what JSON makes of a string: bytes that are not UTF-8 become U+FFFD.
func text(s string) string { return string([]rune(s)) }
