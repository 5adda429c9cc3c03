// Package session keeps one FUSE session alive while the process that answers
// it comes and goes.
//
// A supervisor opens /dev/fuse, mounts, settles the protocol with the kernel
// (INIT) and then starts a worker that inherits the descriptor. When the
// worker dies the next one continues on the same session. No request is lost:
//
//   - Direct: the worker reads /dev/fuse itself. Before the next worker reads,
//     the supervisor sends FUSE_NOTIFY_RESEND and the kernel queues again what
//     had no answer. Linux 6.9 or later; the kernel says so in its INIT
//     request (FUSE_HAS_RESEND), nothing is guessed from a version.
//   - Journal: the supervisor reads /dev/fuse, remembers every request, and
//     hands it to the worker over a SOCK_SEQPACKET pair. The worker answers on
//     /dev/fuse and then acknowledges; what is not acknowledged is handed to
//     the next worker. Any kernel.
//
// Either way an answer may be given twice; the kernel refuses the second one
// with ENOENT, which is not an error here.
//
// The package never looks into a request beyond its header and knows nothing
// of files: it needs no FUSE library and a few hundred kilobytes of heap.
//
// Lock order: there is one lock, journal.mu; nothing is called under it.
package session
