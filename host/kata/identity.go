package kata

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// Limits of what a shim says, in bytes.
const (
	maxID   = 128
	maxPath = 107 // sizeof(sun_path) less its terminating zero, unix(7)
	maxURL  = maxPath + 64
)

// firstCID is the first context ID that a virtual machine can have; those below
// are the hypervisor, the loopback and the host (linux/vm_sockets.h).
const firstCID = 3

// anyCID is VMADDR_CID_ANY.
const anyCID = 1<<32 - 1

// Identity is how the node knows a virtual machine: by the one or the other.
type Identity struct {
	CID  uint32 // AF_VSOCK context ID; 0 with a hybrid socket
	Path string // the VMM's hybrid socket; "" with a context ID
}

// String names the identity for a log.
func (i Identity) String() string {
	if i.Path != "" {
		return "hybrid socket " + i.Path
	}
	return "cid " + strconv.FormatUint(uint64(i.CID), 10)
}

// ParseURL reads what the shim of a sandbox answers to GET /agent-url:
//
//	vsock://<cid>:<port>     QEMU (both runtimes), StratoVirt
//	hvsock://<path>:<port>   Cloud Hypervisor, Firecracker, Dragonball, OpenVMM
//	remote://<path>[:<port>] peer pods: the machine is not on this node
//	:<port>, nothing         runtime-rs before its agent was started
//
// (Go: virtcontainers/types/sandbox.go, String of VSock, HybridVSock and
// RemoteSock; runtime-rs: crates/agent/src/kata/mod.rs, agent_sock, which puts
// the port behind each get_agent_socket of crates/hypervisor.) Classes of
// errors: ErrUnavailable for a shim that is starting, ErrNotImplemented for
// machines that are out of reach, else ErrInvalidArgument.
func ParseURL(sandbox, url string) (Identity, error) {
	if len(url) > maxURL {
		return Identity{}, fmt.Errorf("an agent url of %d bytes, at most %d are taken: %w", len(url), maxURL, errdefs.ErrInvalidArgument)
	}
	scheme, rest, ok := strings.Cut(url, "://")
	if !ok {
		if url == "" || url[0] == ':' {
			return Identity{}, fmt.Errorf("the agent is not started yet: %w", errdefs.ErrUnavailable)
		}
		scheme = "" // refused below
	}
	switch scheme {
	case "vsock":
		return parseCID(url, rest)
	case "hvsock":
		return parseHybrid(sandbox, url, rest)
	case "remote":
		return Identity{}, fmt.Errorf("agent url %q: a remote hypervisor's machine cannot reach this node: %w", url, errdefs.ErrNotImplemented)
	}
	return Identity{}, refused(url, "give vsock://<cid>:<port> or hvsock://<path>:<port>")
}

func parseCID(url, rest string) (Identity, error) {
	cid, port, ok := strings.Cut(rest, ":")
	if !ok || !isPort(port) {
		return Identity{}, refused(url, "there is no port")
	}
	n, err := number(cid)
	if err != nil || n < firstCID || n == anyCID {
		return Identity{}, refused(url, "no virtual machine has that context ID")
	}
	return Identity{CID: n}, nil
}

func parseHybrid(sandbox, url, rest string) (Identity, error) {
	at := strings.LastIndexByte(rest, ':')
	if at < 0 || !isPort(rest[at+1:]) {
		return Identity{}, refused(url, "there is no port")
	}
	path := rest[:at]
	switch {
	case len(path) > maxPath:
		return Identity{}, refused(url, fmt.Sprintf("a socket's path has at most %d bytes", maxPath))
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsFunc(path, unprintable):
		return Identity{}, refused(url, "the path is not a plain absolute one")
	case !below(path, sandbox):
		return Identity{}, refused(url, "the path does not lie below a directory named like the sandbox")
	}
	return Identity{Path: path}, nil
}

// below says whether a directory on the way to path is named like the sandbox,
// as it is with every VMM: so no sandbox can claim another's socket.
func below(path, sandbox string) bool {
	return slices.Contains(strings.Split(filepath.Dir(path), "/"), sandbox)
}

func unprintable(r rune) bool { return r <= ' ' || r > '~' }

func refused(url, why string) error {
	return fmt.Errorf("agent url %q: %s: %w", url, why, errdefs.ErrInvalidArgument)
}

func isPort(s string) bool {
	n, err := number(s)
	return err == nil && n != 0 && n != anyCID // VMADDR_PORT_ANY has the same value
}

// number reads plain decimal digits; strconv alone would let "+1" pass.
func number(s string) (uint32, error) {
	if strings.HasPrefix(s, "+") {
		return 0, strconv.ErrSyntax
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}

// ValidID says whether s can be the id of a sandbox or container: one plain
// path component, as Kata (libs/kata-sys-util/src/validate.rs) and containerd
// (pkg/identifiers/validate.go) have them.
func ValidID(s string) bool {
	if s == "" || len(s) > maxID || !alphanumeric(rune(s[0])) {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return !alphanumeric(r) && !strings.ContainsRune("-_.", r) })
}

func alphanumeric(r rune) bool {
	return r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
}

// Address is where a machine's guest reaches the node at port, in the form
// of package vsock.
func (i Identity) Address(port uint32) string {
	if i.Path != "" {
		return vsock.Address{Network: vsock.Hybrid, Path: i.Path, Port: port}.String()
	}
	return vsock.Address{Network: vsock.VSock, Port: port}.String()
}
