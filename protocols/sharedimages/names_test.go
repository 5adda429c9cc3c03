package sharedimages

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestNames(t *testing.T) {
	d := digest.FromString("x")
	name := Name(d)
	if want := "sha256-" + d.Encoded() + ".erofs"; name != want {
		t.Errorf("name %q, want %q", name, want)
	}
	if got, err := Parse(name); got != d || err != nil {
		t.Errorf("%q is %q, %v", name, got, err)
	}
	for _, bad := range []string{"", ".erofs", "sha256.erofs", "sha256-.erofs", "sha256-xyz.erofs", strings.ToUpper(name), d.String(), name + "x",
		"md5-" + strings.Repeat("a", 32) + ".erofs", "../" + name} {
		if got, err := Parse(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q is %q, %v", bad, got, err)
		}
	}
}
