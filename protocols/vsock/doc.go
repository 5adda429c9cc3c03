// Package vsock dials and listens on the byte streams between a virtual machine
// and its node. Three transports look the same behind one address string:
//
//	unix:/run/x.sock          a unix socket, for tests and development
//	hybrid:/run/vm.sock:2100  a unix socket of the VMM that speaks the CONNECT protocol
//	vsock:3:2100              AF_VSOCK, the peer's CID and port (dial)
//	vsock:2110                AF_VSOCK, any local CID (listen)
//
// In the hybrid protocol (Firecracker, Cloud Hypervisor, Dragonball) a client on
// the node connects to the VMM's socket, sends "CONNECT <port>\n" and reads
// "OK <n>\n"; what the guest connects to (CID 2, port P) arrives at the unix
// socket "<path>_<P>". So Listen on a hybrid address makes "<path>_<port>".
//
// Every connection has CloseWrite besides the methods of net.Conn. On AF_VSOCK
// keep a reader on each connection: Linux does not wake a blocked writer when the
// peer resets a connection that still has unread data.
package vsock

// Ports of Tatami's services, in the guest or on the node.
const (
	GuestPort  = 2100 // ttrpc in the guest: Guest and Runner
	StreamPort = 2101 // containers' standard streams in the guest
	HostPort   = 2110 // ttrpc on the node: Host
	RelayPort  = 2111 // the relay's HTTP on the node
)

// Context IDs with a meaning of their own (linux/vm_sockets.h).
const (
	LocalCID = 1          // loopback
	HostCID  = 2          // the node, seen from a guest
	anyCID   = 0xffffffff // VMADDR_CID_ANY
)
