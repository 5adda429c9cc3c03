// Package store is the read path: it asks sources for chunks, lets in only
// verified ones, keeps them and wakes the readers that wait. Nothing enters it
// except through [fetch.deliver], which has compared size and digest, and
// through [Ingest], whose bytes the caller has just computed the digests from; what
// is in it may be linked ([fetch.link]), which compares the digest once more.
// It never trusts a source, never answers with zeros for bytes that it does not
// have, and never lets one reader's cancellation hurt another.
//
// One kind of table has no digests of plain bytes (index.Vouched). Of such a
// segment the store takes bytes only from a source that is a [Voucher] and
// vouches for this segment: it has checked the compressed bytes before it
// inflated them. To all others it is as if they did not have the segment. A
// Voucher must run in this process and speak only for what it checked itself; a
// client of another machine must not pass that machine's word on unless the
// configuration says that it is trusted.
//
// # Chunk states
//
//	state     where it is seen              left by                  to
//	absent    bit 0, no claim               a reader claims it       fetching
//	fetching  bit 0, claim in the segment   verified and kept        present
//	                                        found elsewhere          present, linked
//	                                        verified, not kept       absent (bytes delivered)
//	                                        no source could give it  absent (error delivered)
//	present   bit 1, no link                Remove                   absent
//	                                        it makes way             absent
//	                                        its sync failed          absent
//	                                        found rotten             absent
//	                                        share, after Ingest      present, linked
//	present,  bit 1, link                   Remove                   absent
//	linked                                  a read sees that the     absent
//	                                        target has lost it
//
// A chunk has at most one claim; whoever needs it meanwhile registers a
// destination on the claim and gets the bytes copied there by the fetch. So
// every byte is fetched once however many readers overlap, and a full disk
// costs nothing but the keeping. Neighbouring absent chunks become one fetch,
// an ordered run of chunks from one stream, whose chunks are verified and
// delivered one by one as they arrive. A reader whose chunk lies further than
// Config.Window ahead of where a fetch has got to does not wait for it: it
// splits the fetch and continues with the far half on a stream of its own.
//
// # What is fetched
//
// A demand read that finds a chunk absent fetches a window: Config.Window bytes
// that begin at most a quarter window before the chunk, so that the reader waits
// for little before it and neighbours on both sides come along. Reads that
// follow one another grow the window twofold up to Config.MaxWindow, and the
// next window is fetched when the reader enters the one before
// ([readahead]). Without Keep the store learns how much of its windows is read before
// they make way: a reader of little here and there gets what it asked for and nothing
// else, one of everything the largest windows ([habit]). Present chunks are never fetched again. Fill and Prefetch fetch
// exactly what they are told to; Fill starts nothing while demand reads wait.
//
// When no source works, a demand fetch asks them again until Config.Patience has
// passed, as long as a reader waits. Readers through other handles then take its
// chunks over.
//
// # Whose work a fetch is
//
// Every fetch carries a sched.Work, by which its source finds out how urgent it is
// (sched.From), and which waits for turns to verify and to write, and for memory (line).
// It begins with the flow of its handle (Image.SetFlow) and a rank: prefetch for the
// windows of reads, background for Fill, and never more than the context of who began
// it says (sched.WithRank). While readers wait for chunks of it, it counts as the most
// urgent of them, whoever's they are ([first]): they register with the fetch ([await]),
// and when one joins, leaves, gets its last chunk, or its handle becomes another
// flow's, the fetch is ranked anew. So what a batch job is fetching when somebody online
// needs it is promoted for as long as he waits, and not fetched twice. The halves of a
// fetch that is split keep the standing that it began with.
//
// A source of type Fixed has told somebody else of the rank when it was asked, as guests
// tell their node. When a reader waits for such a request that was made as if nobody
// did, and nothing comes for a while, it is made anew.
//
// # Keeping
//
// With Config.Keep a segment is one sparse file plus a bitmap file. Bits are set
// in memory at once and reach the disk in this order: data, fdatasync, bitmap
// (a new file, fsync, rename). So bits on disk are trusted at Open; after a
// crash the chunks of the last seconds are simply absent. When the sync fails,
// the kernel may have lost any byte written since the one before: those chunks
// are absent again, reads of them that are under way begin anew, and a chunk
// that was being written meanwhile is not kept.
//
// # Chunks kept once
//
// A chunk of at least a block whose algorithm, sum and length are those of a chunk
// that another segment, or the same, has in its own file is not fetched: it becomes
// a link to that chunk of that segment, the target. Links always lead to own
// chunks, never to links. They need no filesystem that shares blocks and no
// alignment, and cost a read nothing but a look at the target's bit. Where the
// chunks are is remembered in memory ([known]): chunks are added as they are kept,
// and those on disk in the background after Open. When a link is made the target's
// bytes are hashed; rotten ones become absent and are fetched. Chunks of
// index.Vouched are never shared across segments, because nothing could compare
// them with their name. An ingested segment is compared in the background after
// Commit; what the store has elsewhere is linked and its disk given back, except
// chunks that links lead to.
//
// A link says that two chunks are equal, which their tables prove for ever. Whether
// the target has its chunk, the target's bit says, and nothing else: every read
// looks at it, before and (by the epoch) after, and so does Open. So no order of
// writes between two segments can make a read wrong; a target that lost its chunk
// costs a fetch. In a flush, data is synced, then links and then bits are written;
// bits never speak of linked chunks. Before a chunk's own bytes are given back, its
// link and the bits without it are durable, and so is the target's chunk if it was.
//
// Remove and GC keep of a segment that no image uses the chunks that links of used
// ones lead to: first the bits are durable, then the disk of the others is given
// back. So removing an image never takes bytes from another, copies nothing, and
// frees all that only it had. (Chunks in the image's complete file are copied out,
// as those of shared segments are.) A file that Materialize makes has all its own
// bytes.
//
// Without Keep, verified chunks that were fetched ahead of a reader stay in
// memory, at most Config.Memory bytes together with the buffers of running
// fetches, oldest dropped first, all dropped after a minute. A chunk that was
// handed out completely is dropped: the kernel's page cache has it. It is
// remembered as delivered, and windows leave it out, until it is asked for again,
// which says that the page cache has lost it and probably its neighbours.
//
// # Making way
//
// With Config.Quota, or when the disk is full, bytes make way: above the high
// watermark, down to the low one, in the background, and with a pause for demand reads
// as long as there is room for what these bring. What makes way is chosen by package
// replace among the extents of all segments, runs of 8 MiB; a handle is one use of
// what was read through it, which counts when it is closed, for targets of links
// too. Segments that somebody has open are left alone, and those of pinned images,
// those that were ingested for an image to come, and the chunks that links of all
// these lead to; a complete file makes way as a whole, by its name, so that whoever has
// it open reads on. What only the least of several classes has used, and nobody else
// has open, makes way before all else, open or not (that which is open last), and for
// this class nothing else makes way. Images stay known: their bytes are fetched again where they are
// read. When nothing may make way, chunks are delivered and not kept, as on a full
// disk. An Ingest waits for room, once, and is not refused.
//
// An extent goes in this order: no new link to the segment can be made and none that
// counts leads to its chunks (Store.linking); their bits go, in memory and in state
// files, then the epoch changes; the bits on disk are durable without them; their bytes
// are punched. Only the first step is done under Store.mu: the image may be open, or
// be opened meanwhile, and whoever then fetches one of the chunks waits, before it is
// written, until the punching is over (segment.filling). When the disk is too full for
// a new file of bits, the old one is removed instead. A crash between the steps leaves
// bytes that no bit speaks of, which the next eviction of the extent gives back.
//
// What a store takes of the disk is counted as it is kept and corrected with st_blocks
// whenever a segment is flushed. How extents were used is written beside the bits, is
// never synced, and may be lost: then they are colder than they were. Open reads none
// of this; it is collected in the background from directory entries and use files,
// without tables.
//
// # Other processes
//
// [Image.Share] gives a segment's own chunks to another process, by descriptors of
// its file and of a state file that says which of them are there; package shared
// has the rules of both sides. The state file follows the bits: bytes are in the
// file before a bit is set; when they go, or a chunk becomes linked, its bit and
// then the epoch change before anything is overwritten or punched. It ends when
// the segment moves or closes, and Open ends those of an earlier process before it
// touches anything. Nothing is written for a segment that nobody has shared.
//
//	lock                   flock, one process a directory
//	tmp/                   what is being written; emptied at Open
//	images/<hex>.json      image record; its rename makes the image exist
//	images/<hex>.boot      bootstrap
//	images/<hex>.erofs     the complete image as one file (Materialize)
//	segments/<hex>.table   encoded chunk table, its digest is the name
//	segments/<hex>.data    sparse plain bytes
//	segments/<hex>.links   which chunks are read from other segments
//	segments/<hex>.bits    which chunks of .data are there
//	segments/<hex>.home    the bytes live in an image's .erofs instead
//	segments/<hex>.use     what its extents have, and how they were used
//	shared/<hex>.<n>       state file of an open segment; killed and removed at Open
//
// # Locks
//
//	Store.mu (what is open, what is on disk; held over file operations, never by
//	          reads, but by a fetch that links to a segment for the first time)
//	  segment.flushMu (what is on disk of one segment, durable; held over I/O)
//	    segment.filling (that a chunk which is written is not punched; held over I/O)
//	    Store.linking (that what is about to go gets no new links)
//	      segment.mu (claims, waiters, readahead, links, changes of bits; never held
//	                  over I/O, but for page faults of a state file)
//	        handle.mu, Recording.mu, memory.mu, known.mu, usage.mu, room.mu, and the
//	                  locks of package sched (leaves)
package store
