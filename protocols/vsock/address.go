package vsock

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Network names a transport.
type Network string

// The transports.
const (
	Unix   Network = "unix"
	Hybrid Network = "hybrid"
	VSock  Network = "vsock"
)

// maxUnixPath is sizeof(sun_path) less its terminating zero, in bytes.
const maxUnixPath = 107

// Address is where a stream service listens. Which fields count depends on
// Network.
type Address struct {
	Network Network
	Path    string // Unix, Hybrid
	CID     uint32 // VSock; any local CID when HasCID is false
	HasCID  bool   // VSock
	Port    uint32 // Hybrid, VSock
}

// ParseAddress reads an address in one of the forms of the package comment. The
// error is ErrInvalidArgument and quotes the address.
func ParseAddress(s string) (Address, error) {
	network, rest, _ := strings.Cut(s, ":")
	a := Address{Network: Network(network)}
	var err error
	switch a.Network {
	case Unix:
		a.Path = rest
		err = checkPath(a.Path)
	case Hybrid:
		err = a.parseHybrid(rest)
	case VSock:
		err = a.parseVSock(rest)
	default:
		err = fmt.Errorf("unknown transport %q (unix, hybrid or vsock)", network)
	}
	if err != nil {
		return Address{}, fmt.Errorf("parse address %q: %w: %w", s, errdefs.ErrInvalidArgument, err)
	}
	return a, nil
}

func (a *Address) parseHybrid(s string) error {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return fmt.Errorf("no port behind the path")
	}
	a.Path = s[:i]
	if err := checkPath(a.Path); err != nil {
		return err
	}
	var err error
	a.Port, err = parsePort(s[i+1:])
	return err
}

func (a *Address) parseVSock(s string) error {
	cid, port, both := strings.Cut(s, ":")
	if !both {
		port = cid
	} else {
		n, err := parseUint(cid)
		if err != nil || n == anyCID {
			return fmt.Errorf("context ID %q is not a number below %d", cid, uint32(anyCID))
		}
		a.CID, a.HasCID = n, true
	}
	var err error
	a.Port, err = parsePort(port)
	return err
}

// String is the form that ParseAddress reads.
func (a Address) String() string {
	switch {
	case a.Network == Unix:
		return fmt.Sprintf("unix:%s", a.Path)
	case a.Network == Hybrid:
		return fmt.Sprintf("hybrid:%s:%d", a.Path, a.Port)
	case a.HasCID:
		return fmt.Sprintf("vsock:%d:%d", a.CID, a.Port)
	}
	return fmt.Sprintf("vsock:%d", a.Port)
}

// HybridListenPath is the unix socket at which a connection of the guest to port
// arrives when the VMM's own socket is path.
func HybridListenPath(path string, port uint32) string {
	return path + "_" + strconv.FormatUint(uint64(port), 10)
}

func checkPath(p string) error {
	switch {
	case p == "":
		return fmt.Errorf("no path")
	case strings.IndexByte(p, 0) >= 0:
		return fmt.Errorf("zero byte in path")
	case len(p) > maxUnixPath:
		return fmt.Errorf("path of %d bytes, unix sockets allow %d", len(p), maxUnixPath)
	}
	return nil
}

func parsePort(s string) (uint32, error) {
	n, err := parseUint(s)
	if err != nil || n == anyCID { // VMADDR_PORT_ANY has the same value
		return 0, fmt.Errorf("port %q is not a number below %d", s, uint32(anyCID))
	}
	return n, nil
}

// parseUint reads plain decimal digits; strconv alone would let "+1" pass.
func parseUint(s string) (uint32, error) {
	if strings.HasPrefix(s, "+") {
		return 0, strconv.ErrSyntax
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}
