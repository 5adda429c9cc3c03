package kata

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const sid = "2f0b3c9d8e7a6b5c4d3e2f1a0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c"

// What every VMM's shim answers, with the upstream file that makes it.
func TestParseURL(t *testing.T) {
	for _, tc := range []struct {
		name, url string
		want      Identity
	}{
		// runtime-rs: crates/hypervisor/src/qemu/inner.rs; Go: virtcontainers/qemu.go.
		{"QEMU", "vsock://3405691582:1024", Identity{CID: 3405691582}},
		{"smallest cid", "vsock://3:1024", Identity{CID: 3}},
		{"largest cid", "vsock://4294967294:1024", Identity{CID: 4294967294}},
		// ch/utils.rs, get_vsock_path
		{"Cloud Hypervisor, Rust", "hvsock:///run/kata/" + sid + "/ch-vm.sock:1024", Identity{Path: "/run/kata/" + sid + "/ch-vm.sock"}},
		// virtcontainers/clh.go, vsockSocketPath
		{"Cloud Hypervisor, Go", "hvsock:///run/vc/vm/" + sid + "/clh.sock:1024", Identity{Path: "/run/vc/vm/" + sid + "/clh.sock"}},
		// firecracker/inner_hypervisor.rs, get_agent_socket
		{"Firecracker, Rust", "hvsock:///run/kata/" + sid + "/kata.hvsock:1024", Identity{Path: "/run/kata/" + sid + "/kata.hvsock"}},
		{"jailed Firecracker, Rust", "hvsock:///run/kata/firecracker/" + sid + "/root/kata.hvsock:1024", Identity{Path: "/run/kata/firecracker/" + sid + "/root/kata.hvsock"}},
		// virtcontainers/fc.go, setPaths
		{"Firecracker, Go", "hvsock:///run/vc/firecracker/" + sid + "/root/kata.hvsock:1024", Identity{Path: "/run/vc/firecracker/" + sid + "/root/kata.hvsock"}},
		// crates/hypervisor/src/utils.rs, get_hvsock_path
		{"Dragonball", "hvsock:///run/kata/" + sid + "/root/kata.hvsock:1024", Identity{Path: "/run/kata/" + sid + "/root/kata.hvsock"}},
		// openvmm/inner_hypervisor.rs, get_agent_socket
		{"OpenVMM", "hvsock:///run/kata/" + sid + "/vsock.sock:1024", Identity{Path: "/run/kata/" + sid + "/vsock.sock"}},
		// virtcontainers/pkg/rootless: below the user's own directory
		{"rootless", "hvsock:///run/user/1234/run/kata/" + sid + "/ch-vm.sock:1024", Identity{Path: "/run/user/1234/run/kata/" + sid + "/ch-vm.sock"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, err := ParseURL(sid, tc.url); err != nil || got != tc.want {
				t.Errorf("got %+v, %v, want %+v", got, err, tc.want)
			}
		})
	}
}

func TestParseURLErrors(t *testing.T) {
	for _, tc := range []struct {
		name, url string
		class     func(error) bool
	}{
		{"starting, nothing", "", errdefs.IsUnavailable},       // shim_mgmt/handlers.rs: agent_sock failed
		{"starting, no agent", ":1024", errdefs.IsUnavailable}, // agent/src/kata/mod.rs: socket_address is empty
		// virtcontainers/remote.go; remote/inner.rs
		{"remote, Go", "remote:///run/peerpod/pods/" + sid + "/agent.ttrpc", errdefs.IsNotImplemented},
		{"remote, Rust", "remote:///run/peerpod/pods/" + sid + "/agent.ttrpc:1024", errdefs.IsNotImplemented},
		{"mock", "mock:///tmp/" + sid + "/kata-mock-hybrid-vsock.socket", errdefs.IsInvalidArgument},
		{"hypervisor cid", "vsock://0:1024", errdefs.IsInvalidArgument},
		{"loopback cid", "vsock://1:1024", errdefs.IsInvalidArgument},
		{"host cid", "vsock://2:1024", errdefs.IsInvalidArgument},
		{"any cid", "vsock://4294967295:1024", errdefs.IsInvalidArgument},
		{"minus one", "vsock://-1:1024", errdefs.IsInvalidArgument},
		{"signed", "vsock://+5:1024", errdefs.IsInvalidArgument},
		{"too large", "vsock://4294967299:1024", errdefs.IsInvalidArgument}, // 3 in 32 bits
		{"no port", "vsock://5", errdefs.IsInvalidArgument},
		{"bad port", "vsock://5:x", errdefs.IsInvalidArgument},
		{"port 0", "vsock://5:0", errdefs.IsInvalidArgument},
		{"two ports", "vsock://5:1:2", errdefs.IsInvalidArgument},
		{"hybrid, no port", "hvsock:///run/kata/" + sid + "/x", errdefs.IsInvalidArgument},
		{"relative", "hvsock://run/" + sid + "/x:1024", errdefs.IsInvalidArgument},
		{"not clean", "hvsock:///run/kata/" + sid + "/../../../etc/x:1024", errdefs.IsInvalidArgument},
		{"another's", "hvsock:///run/kata/other/ch-vm.sock:1024", errdefs.IsInvalidArgument},
		{"anywhere", "hvsock:///etc/" + sid + ":1024", errdefs.IsInvalidArgument}, // its name only
		{"zero byte", "hvsock:///run/kata/" + sid + "/a\x00b:1024", errdefs.IsInvalidArgument},
		{"new line", "hvsock:///run/kata/" + sid + "/a\nb:1024", errdefs.IsInvalidArgument},
		{"long path", "hvsock:///" + strings.Repeat("x", 60) + "/" + sid + "/s:1024", errdefs.IsInvalidArgument},
		{"long", strings.Repeat("x", maxURL+1), errdefs.IsInvalidArgument},
		{"other", "unix:///run/kata/" + sid + "/s", errdefs.IsInvalidArgument},
		{"words", "URL NOT FOUND", errdefs.IsInvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, err := ParseURL(sid, tc.url); !tc.class(err) || got != (Identity{}) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

func FuzzParseURL(f *testing.F) {
	for _, url := range []string{"", ":1024", "vsock://3:1024", "hvsock:///run/kata/" + sid + "/ch-vm.sock:1024", "remote:///x:1024", "vsock://-1:1024"} {
		f.Add(sid, url)
	}
	f.Fuzz(func(t *testing.T, id, url string) {
		got, err := ParseURL(id, url)
		switch {
		case err != nil && got != (Identity{}):
			t.Errorf("%+v beside %v", got, err)
		case err == nil && got.Path == "" && (got.CID < firstCID || got.CID == anyCID):
			t.Errorf("cid %d", got.CID)
		case err == nil && got.Path != "" && (got.CID != 0 || len(got.Path) > maxPath || !strings.Contains(got.Path, "/"+id+"/")):
			t.Errorf("%+v for sandbox %q", got, id)
		}
	})
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		sid: true, "a": true, "web-1_x.y": true, strings.Repeat("a", maxID): true,
		"": false, ".": false, "..": false, ".hidden": false, "-x": false, "a/b": false, "a\x00": false, "ä": false,
		"a b": false, "a\n": false, strings.Repeat("a", maxID+1): false,
	} {
		if ValidID(id) != want {
			t.Errorf("%q: %v", id, !want)
		}
	}
}
