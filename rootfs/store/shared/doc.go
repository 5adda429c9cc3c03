// Package shared lets another process read the chunks that a store has, without
// asking it for each: from the store's own file, at places that a state file
// says. The store is the one writer of a [State]; each process that got
// descriptors of both files reads through a [Segment].
//
// A chunk's bytes may go at any time: the store gives disk back, a failed sync
// loses them, rot is found. So the reader does what the store's own reads do:
//
//	f, at, n, stamp := seg.Map(off)  // the epoch, then the state and the bits
//	pread(f, at, …)                  // up to n bytes
//	seg.Valid(stamp)                 // the epoch again: false, do it over
//
// and the writer keeps this order:
//
//	bytes come   data in the file, then Set
//	bytes go     Clear, then Bump, and only then may they be overwritten or punched
//	file leaves  End, which changes the epoch too
//
// A reader that saw the bit of a chunk whose bytes went before its pread was done
// finds another epoch. What is between chunks is zeros in the file and needs no
// bit.
//
// # State file
//
// Words of 8 bytes in the byte order of the machine, which both processes run on:
//
//	0        magic
//	1        version
//	2        state: live, moved or dead; every other value is dead
//	3        epoch
//	4        n, the number of chunks
//	5        size of the segment in bytes
//	6, 7     0
//	8        n offsets of chunks in the segment, rising
//	8+n      n ends of chunks, none behind the offset of the next
//	8+2n     bits, (n+63)/64 words, chunk 0 in the lowest bit
//
// State, epoch and bits change, everything else does not. The first four words mean
// the same in all versions, so that a store of one can end what another one has left.
//
// # Trust
//
// The reader takes nothing from the writer on trust but two things: bytes are as
// good as who wrote them, and the writer does not truncate a state file, which
// would end a reader that has it mapped (SIGBUS). A store never truncates one.
// Whatever else is in the file, a Segment answers with places within the segment.
//
// What the disk loses before the store learns of it cannot be helped here, as it
// cannot in the store; that is so, too, while no store runs: state files stay live
// until the next one opens.
//
// The writer trusts no reader: readers get descriptors that were opened read-only,
// of files that only the store's user can open again.
package shared
