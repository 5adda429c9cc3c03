// Package vhostuser is the device side ("back-end") of vhost-user: a VMM hands over
// its guest's memory and the virtqueues of one virtio device through a unix
// socket, and this package runs a [Device] on them.
//
// It knows split virtqueues with event index and indirect descriptors, memory as
// one table or as slots that come and go, and the protocol features MQ, REPLY_ACK,
// CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS and STATUS. Message numbers and
// layouts are those of QEMU's docs/interop/vhost-user.rst, rings those of the
// virtio 1.2 specification, section 2.7. Little-endian machines only.
//
// A guest may write anything into its memory at any time. Every index, address
// and length is checked after it was copied out; a chain has at most maxChain
// descriptors; nothing is parsed in place. A ring that breaks the rules breaks
// the device: its queues stand still until the driver starts them again, the VMM
// is told through the queue's error descriptor and the owner through
// Config.Broken. The VMM is trusted with its own guest's memory only: if it
// truncates the memory file after handing it over, this process gets SIGBUS.
//
// States of a queue, and what the device is told:
//
//	idle    → running  started, enabled, all of it set    Device.Serve begins
//	running → paused   disabled, memory table changes     Device.Serve returns
//	paused  → running  enabled, memory table set          Device.Serve begins
//	any     → idle     stopped, reset, connection ends    Device.Stopped, once
//
// Chains that were taken keep the memory mapped: a queue pauses only after all of
// them were given back. Those without an answer are kept over a change of the
// memory and popped again; a queue that is disabled or stopped is drained first.
//
// A [Relay] lets the device outlive its process: it stands between the VMM and the
// processes that run a Server, one after another, and each takes up the chains that
// the one before has not answered.
//
// Lock order: breaker.mu, Queue.mu, Queue.callMu; the last two are never held
// together.
package vhostuser
