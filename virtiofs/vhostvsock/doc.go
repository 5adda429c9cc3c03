// Package vhostvsock is a virtio-vsock device behind vhost-user, for nodes without
// vhost_vsock in their kernel. On the node's side it speaks the hybrid protocol of
// Firecracker and Cloud Hypervisor (package protocols/vsock): clients connect to
// one unix socket and name a port; what the guest connects to (CID 2, port P)
// goes to the unix socket <path>_<P>. Streams only.
//
// Bytes are copied once: to the guest by readv from the unix socket into the
// guest's receive buffers, from the guest by sendmsg out of its memory. Only when
// the host peer is slow are bytes of the guest kept, at most Config.Buffer for
// each connection: that is the credit which the guest gets.
//
// Fairness: the receive queue is used in turns, first come first served, of at
// most batchBytes. A turn never waits for a host peer, only for the guest to offer
// buffers; the transmit queue waits for nothing at all.
//
// Goroutines: each connection has two, counted in Device.wg; the receive queue's
// Serve has one beside it. A device whose queues were stopped has no connections.
//
// Locks: Device.mu and conn.mu are never held together; while a turn is held, both
// may be taken. conn.mu is held during sendmsg, which does not block.
//
// Packet layout and rules: virtio 1.2, section 5.10.
package vhostvsock
