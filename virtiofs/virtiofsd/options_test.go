package virtiofsd

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		name, args string
		want       Options
	}{
		// Kata's runtime in Go: src/runtime/virtcontainers/virtiofsd.go, args.
		{"Go", "--syslog --cache=auto --shared-dir=/run/s --fd=3 --thread-pool-size=1 -o announce_submounts",
			Options{SharedDir: "/run/s", FD: 3, Cache: "auto", Syslog: true, Notes: []string{"thread-pool-size", "announce-submounts"}}},
		// runtime-rs: share_virtio_fs_standalone.rs, virtiofsd_args.
		{"Rust", "--socket-path /run/v.sock --shared-dir /run/s --cache never --thread-pool-size=1 -o announce_submounts --xattr",
			Options{SharedDir: "/run/s", SocketPath: "/run/v.sock", FD: -1, Cache: "never", Notes: []string{"thread-pool-size", "announce-submounts", "xattr"}}},
		{"C", "-f --fd=3 -o source=/s,cache=always,no_posix_lock,log_level=debug,sandbox=chroot",
			Options{SharedDir: "/s", FD: 3, Cache: "always", Debug: true, Notes: []string{"f", "no-posix-lock"}}},
		{"unknown", "--shared-dir /s --fd 4 --new-thing --other value --third=3 --tag images",
			Options{SharedDir: "/s", FD: 4, Cache: "auto", Tag: "images", Notes: []string{"new-thing", "other", "value", "third"}}},
		{"protection", "--sandbox=namespace --seccomp kill --shared-dir=/s --fd=3", Options{SharedDir: "/s", FD: 3, Cache: "auto"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Parse(strings.Fields(tc.args), io.Discard)
			if err != nil || !reflect.DeepEqual(*got, tc.want) {
				t.Errorf("%+v, %v; want %+v", got, err, tc.want)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	const good = "--shared-dir=/s --fd=3 "
	for _, args := range []string{
		"", "--fd=3", "--shared-dir=/s", good + "--socket-path=/x", good + "--cache=some", good + "--fd=-1", good + "--fd=x",
		good + "--writeback", good + "-o writeback", good + "--modcaps=+sys_admin", good + "-o modcaps=+sys_admin", good + "--sandbox=none",
		good + "--sandbox none", good + "-o sandbox=none", good + "--seccomp=none", good + "--posix-acl", good + "-o posix_acl",
		good + "--translate-uid=map:0:1000:1", good + "--uid-map=:0:1:1:", good + "--security-label",
		good + "virtiofs", good + "--cache", good + "-o", "--shared-dir", good + "--xattr value", good + "-",
	} {
		if o, err := Parse(strings.Fields(args), io.Discard); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %+v, %v", args, o, err)
		}
	}
}

func TestHelp(t *testing.T) {
	var out bytes.Buffer
	_, err := Parse([]string{"--help"}, &out)
	if !errors.Is(err, flag.ErrHelp) || !strings.Contains(out.String(), "no passthrough") {
		t.Errorf("%v: %s", err, &out)
	}
}
