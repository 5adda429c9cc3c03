package pathlist

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestRead(t *testing.T) {
	for _, c := range []struct {
		text string
		want []string
		says string
	}{
		{"", nil, ""},
		{"/usr/bin/x\n\n # note\n  ./etc//y \r\n", []string{"usr/bin/x", "etc/y"}, ""},
		{"a\n../b\n", nil, "line 2"},
		{strings.Repeat("x", 70_000), nil, "too long"},
		{"a\n" + strings.Repeat("b\n", maxPaths), nil, "line 1048577"},
	} {
		got, err := Read(strings.NewReader(c.text))
		if c.says == "" && (err != nil || !slices.Equal(got, c.want)) {
			t.Errorf("%.40q: %q, %v", c.text, got, err)
		}
		if c.says != "" && (got != nil || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%.40q: %d paths, %v", c.text, len(got), err)
		}
	}
}

// What a list cannot say is left out of it.
func TestWrite(t *testing.T) {
	paths := []string{"usr/bin/x", "a b", "a\nb", "tail ", "#x", "é"}
	list := Write(paths)
	if string(list) != "/usr/bin/x\n/a b\n/#x\n/é\n" {
		t.Errorf("%q", list)
	}
	again, err := Read(bytes.NewReader(list))
	if want := []string{"usr/bin/x", "a b", "#x", "é"}; err != nil || !slices.Equal(again, want) {
		t.Errorf("read %q, %v", again, err)
	}
	if long := Write(slices.Repeat([]string{strings.Repeat("x", 1000)}, 4000)); len(long) > MaxSize || len(long) < MaxSize-1100 {
		t.Errorf("a list of %d bytes", len(long))
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("/usr/bin/x\n\n # note\n  ./etc//y \r\n"))
	f.Add([]byte("a\n../b\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		paths, err := Read(bytes.NewReader(data))
		if err != nil {
			return
		}
		for _, p := range paths {
			if strings.HasPrefix(p, "/") || p == ".." || strings.HasPrefix(p, "../") {
				t.Fatalf("%q leads out of an image", p)
			}
		}
		again, err := Read(bytes.NewReader(Write(paths)))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range again {
			if !slices.Contains(paths, p) {
				t.Fatalf("%q was not in the list", p)
			}
		}
	})
}
