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
	"github.com/tatami-containers/tatami/virtiofs/confine"
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
			Options{SharedDir: "/s", FD: 3, Cache: "always", Debug: true, Sandbox: confine.Chroot, Notes: []string{"f", "no-posix-lock"}}},
		{"unknown", "--shared-dir /s --fd 4 --new-thing --other value --third=3 --tag images",
			Options{SharedDir: "/s", FD: 4, Cache: "auto", Tag: "images", Notes: []string{"new-thing", "other", "value", "third"}}},
		{"images", "--shared-dir=/run/kata-containers/shared/sandboxes/s1/ro --fd=3 --images /i",
			Options{SharedDir: "/run/kata-containers/shared/sandboxes/s1/ro", FD: 3, Cache: "auto", Images: "/i", SandboxID: "s1"}},
		{"images of", "--shared-dir=/s --fd=3 --images=/i --sandbox-id=x", Options{SharedDir: "/s", FD: 3, Cache: "auto", Images: "/i", SandboxID: "x"}},
		// src/runtime/virtcontainers/nydusd.go, args, with the base configuration's
		// virtio_fs_extra_args (src/runtime/Makefile, DEFVIRTIOFSEXTRAARGS; runtime-rs has another form).
		{"Go, nydus", "virtiofs --log-level debug --apisock /run/vc/vm/s1/nydusd-api.sock --sock /run/vc/vm/s1/vhost-fs.sock --thread-pool-size=1 --announce-submounts --passthrough",
			Options{Nydus: true, APISocket: "/run/vc/vm/s1/nydusd-api.sock", SocketPath: "/run/vc/vm/s1/vhost-fs.sock", FD: -1, Cache: "auto", Debug: true, Passthrough: true,
				Notes: []string{"thread-pool-size"}}},
		// runtime-rs: crates/resource/src/share_fs/nydus/nydus_daemon.rs, build_args.
		{"Rust, nydus", "virtiofs --hybrid-mode --log-level info --apisock /run/kata/s1/root/nydusd-api.sock --sock /run/kata/s1/root/virtiofsd.sock --thread-pool-size=1 -o announce_submounts",
			Options{Nydus: true, APISocket: "/run/kata/s1/root/nydusd-api.sock", SocketPath: "/run/kata/s1/root/virtiofsd.sock", FD: -1, Cache: "auto",
				Notes: []string{"thread-pool-size", "announce-submounts"}}},
		// The same of a VMM without root, which runs beside its sockets.
		{"Rust, nydus, rootless", "virtiofs --hybrid-mode --log-level info --apisock nydusd-api.sock --sock virtiofsd.sock --passthrough --thread-num 4",
			Options{Nydus: true, APISocket: "nydusd-api.sock", SocketPath: "virtiofsd.sock", FD: -1, Cache: "auto", Passthrough: true, Notes: []string{"thread-num"}}},
		{"protection", "--sandbox=namespace --seccomp trap --shared-dir=/s --fd=3", Options{SharedDir: "/s", FD: 3, Cache: "auto", Sandbox: confine.Namespace, Trap: true}},
		{"less", "--sandbox none --seccomp=kill --shared-dir=/s --fd=3", Options{SharedDir: "/s", FD: 3, Cache: "auto", Sandbox: confine.None}},
		{"passthrough", "--shared-dir=/s --fd=3 --passthrough --xattr --no-xattr --readonly -o killpriv_v2,no_announce_submounts --f",
			Options{SharedDir: "/s", FD: 3, Cache: "auto", Notes: []string{"f"}, Passthrough: true, Files: FileOptions{ReadOnly: true, KillPriv: true, NoSubmounts: true}}},
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
	const nydus = "virtiofs --sock=/s --apisock=/a "
	for _, args := range []string{
		"", "--fd=3", "--shared-dir=/s", good + "--socket-path=/x", good + "--cache=some", good + "--fd=-1", good + "--fd=x",
		good + "--writeback", good + "-o writeback", good + "--modcaps=+sys_admin", good + "-o modcaps=+sys_admin", good + "--sandbox=jail",
		good + "--sandbox", good + "-o sandbox=jail", good + "--seccomp=none", good + "--seccomp log", good + "--seccomp=x", good + "--posix-acl", good + "-o posix_acl",
		good + "--translate-uid=map:0:1000:1", good + "--uid-map=:0:1:1:", good + "--security-label",
		good + "--images=/i", good + "--images=/i --sandbox-id=" + strings.Repeat("x", 257), good + "virtiofs", good + "--cache", good + "-o", "--shared-dir", good + "--xattr value", good + "-",
		good + "--apisock=/a", good + "--passthrough --sandbox=none", "virtiofs", "virtiofs --sock=/s", "virtiofs --apisock=/a", nydus + " virtiofs",
		nydus + "--shared-dir=/d", nydus + "--fd=3", nydus + "--bootstrap=/b", nydus + "--bootstrap /b", nydus + "--upgrade", nydus + "--sandbox=none", nydus + "--sandbox chroot", nydus + "--cache=x",
	} {
		if o, err := Parse(strings.Fields(args), io.Discard); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %+v, %v", args, o, err)
		}
	}
}

func TestSandboxOf(t *testing.T) {
	for _, tc := range []struct{ dir, socket, want string }{
		{"/run/kata-containers/shared/sandboxes/abc/ro", "/x/y", "abc"},
		{"/run/kata-containers/shared/sandboxes/abc", "", "abc"},
		{"/s", "/run/vc/vm/abc/vhost-fs.sock", "abc"},
		{"/s", "/run/kata/abc/root/virtiofsd.sock", "abc"},
		{"/s", "", ""}, {"/s", "/x.sock", ""}, {"/s", "x.sock", ""},
	} {
		if got := sandboxOf(tc.dir, tc.socket); got != tc.want {
			t.Errorf("%s, %s: %q, want %q", tc.dir, tc.socket, got, tc.want)
		}
	}
}

func TestHelp(t *testing.T) {
	var out bytes.Buffer
	_, err := Parse([]string{"--help"}, &out)
	if !errors.Is(err, flag.ErrHelp) || !strings.Contains(out.String(), "--passthrough") {
		t.Errorf("%v: %s", err, &out)
	}
}
