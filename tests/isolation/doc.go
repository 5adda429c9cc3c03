// Package isolation measures what a storm of batch sandboxes does to an online one that
// shares its node: real programs (tatami-host, and a tatami-guest with FUSE and EROFS for
// each sandbox), a registry behind a link of its own, and the kernel's queues. Every
// experiment has three arms in one run:
//
//	alone        the online sandbox without anybody else
//	unprotected  with the storm; [schedule] is off, and nobody says what is batch
//	protected    with the storm and with what the node does about it by default
//
// `make bench-isolation` runs all of them and writes a table and charts to
// .cache/isolation; the tests of this package run small ones and look at counts.
//
// # What is real and what is not
//
// The registry is in this process. It listens in a network namespace, whose only way out
// is a veth pair with a token bucket (tc-tbf(8)) of the link's rate and a queue of 1 MiB,
// and answers a round-trip time late. Where namespaces cannot be made, package tools/link
// stands in. The sandboxes are processes on this machine, not virtual machines, and have
// no vsock but unix sockets. What belongs to batch sandboxes runs under SCHED_IDLE in all
// arms, as a kubelet gives a pod of BestEffort the least cpu.weight there is: so what
// differs between the arms is not the kernel's doing. Cgroups are not used: a container
// that builds or tests this may not have any that it can write to.
//
// # Faults
//
// The online sandbox maps files of its image and reads a byte of a page at a time, 1,000
// times a second, whether those before have been answered or not. Of these pages
//
//	at the registry  8 a second lie in a MiB that nobody has read yet
//	on the node     40 a second lie in 64 KiB that this sandbox has not read yet, but
//	                another one on this node before it
//	in memory       the others: the sandbox has read them, and the page cache has them
//
// The time is that of the fault alone, as the process sees it.
package isolation
