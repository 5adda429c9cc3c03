// Package sched decides whose work goes first where work queues on a node: for
// requests to a registry, for the link, for the CPU that unpacks, for the disk, for
// what is sent to sandboxes.
//
// All queues have the same order (core). First come the classes that are below their
// floor, then the others by start-time fair queueing over their shares
// (Goyal, Vin, Cheng 1996); in a class strictly the most urgent rank; in a rank the
// flows fairly, by the same queueing; in a flow who came first. What may go goes: a
// share is no bound, only a ceiling is. Nobody saves up what he did not use.
//
// Background work, which nobody has asked for, goes below: that of all classes together
// has the weight of the least class, all else the rest of the sum. So what is asked for
// gets at least (sum - least) / sum of what both want, whoever asks. Classes share each
// of the two by their shares and are charged for each apart. Floors and ceilings are of
// all that a class gets, and a floor holds for its background work, too.
//
// # Queues
//
// These points of a node have a queue:
//
//	what waits                                  queue               charged
//	requests to a registry or mirror            Upstream.Begin      turns
//	bytes of their answers                      Upstream.Receive    bytes of the host and of the link
//	indexes and layers that are built           host/node builds    turns of a registry
//	unpacking, hashing, reading of indexes      CPU                 time
//	chunks, ingested layers, blobs to be kept   Disk                time
//	memory for chunks under way                 store, line         bytes, by class and rank
//	pieces of answers to sandboxes (relay,
//	virtio-fs devices) and to the mirror        Relay               time
//
// Requests of one sandbox, of which a bounded number is answered at a time, wait for
// each other alone; those that its guest says are for later (RFC 9218) take half of
// them at most.
//
// A turn is short and is never taken away. What somebody else can hold up is done
// without one, or ends it after a while (Slots.Brief).
//
// # Links
//
// Bytes are granted before they are read, about a millisecond of the rate at a time. A
// grant to a class therefore costs nothing once another wants the link. That alone does
// not free the link, as TCP has asked for more already: what waits in the receive buffers
// is not on the way, but what the buffers have room for is. So buffers are bounded to what
// their connection can use (wires). And when a class begins to want something beside a
// less important one, that gets less than comes for it until buffers are full and the
// queues of the network empty (estimate.full): the link is used by what is on the way.
// Then the rate, a little less than the capacity, keeps them so, and TCP lets the more
// important class become as fast as it can.
//
// The capacity of a host is measured: by what comes while readers wait for the network,
// by probes for more, and by what the kernel says of connections. What is slow because
// nobody wants it, because the machine is busy, or because other hosts take the link says
// nothing. The link's own capacity is only known when Config says so; else it is what has
// been seen to pass, to which the most important class that wants something does not
// keep. A Link above what really passes protects less: say what payload passes, or nothing.
//
// # Parts
//
// core, pace, turns and estimate are pure: they have no clock, no lock and no
// goroutine, and now is an argument, the time since the scheduler began. rateQueue and
// Slots put a mutex and a timer around them.
//
// Lock order: a queue, then Work. Two queues are never locked at once.
package sched
