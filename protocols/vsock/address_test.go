package vsock

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseAddress(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want Address
	}{
		{"unix:/run/a.sock", Address{Network: Unix, Path: "/run/a.sock"}},
		{"unix:/run/a:b", Address{Network: Unix, Path: "/run/a:b"}},
		{"hybrid:/run/vm.sock:2100", Address{Network: Hybrid, Path: "/run/vm.sock", Port: 2100}},
		{"hybrid:/run/a:b:7", Address{Network: Hybrid, Path: "/run/a:b", Port: 7}},
		{"vsock:3:1024", Address{Network: VSock, CID: 3, HasCID: true, Port: 1024}},
		{"vsock:0:1", Address{Network: VSock, HasCID: true, Port: 1}},
		{"vsock:2110", Address{Network: VSock, Port: 2110}},
		{"vsock:4294967294", Address{Network: VSock, Port: 4294967294}},
	} {
		t.Run(tc.in, func(t *testing.T) {
			got, err := ParseAddress(tc.in)
			if err != nil || got != tc.want {
				t.Fatalf("got %+v, %v; want %+v", got, err, tc.want)
			}
			if got.String() != tc.in {
				t.Errorf("String is %q", got.String())
			}
		})
	}
}

func TestParseAddressRefuses(t *testing.T) {
	for _, in := range []string{
		"", "unix", "unix:", "tcp:localhost:80", "hybrid:/run/vm.sock", "hybrid::5", "hybrid:/a:", "hybrid:/a:-1",
		"hybrid:/a:4294967296", "vsock:", "vsock:x:1", "vsock:1:x", "vsock:4294967295:1", "vsock:+3:1", "vsock:3:+1",
		"vsock:1:2:3", "vsock:4294967295", "unix:/a\x00b", "unix:/" + strings.Repeat("x", 107),
	} {
		if a, err := ParseAddress(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %+v, %v; want ErrInvalidArgument", in, a, err)
		}
	}
}

func FuzzParseAddress(f *testing.F) {
	for _, s := range []string{"unix:/a", "hybrid:/a:1", "vsock:3:1", "vsock:1", "vsock:3:01", ":::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddress(s)
		if err != nil {
			return
		}
		b, err := ParseAddress(a.String())
		if err != nil || a != b {
			t.Fatalf("%q gives %+v, its String gives %+v, %v", s, a, b, err)
		}
	})
}
