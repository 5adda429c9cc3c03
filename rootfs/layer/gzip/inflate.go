package gzip

import "encoding/binary"

const (
	windowSize = 32 << 10 // how far back a match may reach, bytes

	// outputSize is how much plain data is decoded before it is handed over:
	// the smaller, the more of the working set stays in the L2 cache; the
	// larger, the less often the window moves to the front.
	outputSize = windowSize + 96<<10

	// A step of the fast loop reads at most stepInput bytes ahead and writes
	// at most stepOutput: three literals, the longest match, and what copying
	// in whole words may write behind a match.
	stepInput  = 24
	stepOutput = 3 + 258 + 32
)

// state says what the next bits of a stream are.
type state uint8

const (
	atBlock  state = iota // the header of a block: checkpoints are possible
	inCodes               // symbols of a block with Huffman codes
	inStored              // bytes of a stored block
	atEnd                 // behind the last block
)

// inflater decodes one DEFLATE stream.
type inflater struct {
	in    input
	state state
	last  bool // the current block is the last one
	left  int  // bytes of a stored block to come

	end   int   // behind the last decoded byte of out
	first int   // oldest byte of out that a match may copy
	total int64 // plain bytes before out[end], of the whole blob

	fixed   bool // the tables are those of the fixed codes
	literal [literalSize]uint32
	dist    [distSize]uint32
	code    code

	out [outputSize]byte
}

// start begins a stream, with window before it (empty: matches cannot reach
// back) and total plain bytes of the blob in front of it.
func (z *inflater) start(window []byte, total int64) {
	z.state, z.last = atBlock, false
	z.first = 0
	z.end = copy(z.out[:], window)
	z.total = total
}

// restart begins the next stream of the same blob.
func (z *inflater) restart() {
	z.state, z.last = atBlock, false
	z.first = z.end
}

// slide moves the window to the front of out when there is too little room
// behind end. Nobody may use slices of out from before.
func (z *inflater) slide() {
	if z.end <= outputSize-stepOutput-windowSize/2 {
		return
	}
	keep := min(windowSize, z.end-z.first)
	copy(z.out[:], z.out[z.end-keep:z.end])
	z.first, z.end = 0, keep
}

// window is what a match may copy from here, at most windowSize bytes.
func (z *inflater) window() []byte {
	return z.out[max(z.first, z.end-windowSize):z.end]
}

// next decodes some of the current block: until its end, or until out is full
// or has at least want more bytes. It returns the decoded bytes, valid until
// the next call. At atBlock it reads the header only, and at atEnd nothing.
func (z *inflater) next(want int) ([]byte, error) {
	var err error
	start := z.end
	stop := min(outputSize-stepOutput, start+want)
	switch z.state {
	case atBlock:
		err = z.header()
	case inCodes:
		err = z.codes(stop)
	case inStored:
		err = z.stored(stop)
	}
	z.total += int64(z.end - start)
	return z.out[start:z.end], err
}

// endBlock goes on to what follows a block.
func (z *inflater) endBlock() {
	z.state = atBlock
	if z.last {
		z.state = atEnd
	}
}

// codes decodes symbols until the block ends or z.end reaches stop.
func (z *inflater) codes(stop int) error {
	for z.end < stop {
		if z.in.end-z.in.pos < stepInput && z.in.err == nil {
			z.in.fill()
		}
		var e uint32
		var err error
		if z.in.end-z.in.pos >= stepInput {
			e, err = z.fast(stop)
		} else {
			e, err = z.slow()
		}
		if err != nil {
			return err
		}
		if e&flagStop != 0 {
			z.endBlock()
			return nil
		}
	}
	return nil
}

// fast decodes symbols while at least stepInput bytes are buffered. It returns
// the entry that ended the block, or 0 when it stops before. It is one long
// function because the time to read an image for the first time is spent here:
// its state must stay in registers.
func (z *inflater) fast(stop int) (uint32, error) {
	in, out, literal, distances := &z.in.buf, &z.out, &z.literal, &z.dist
	op, first, last := z.end, z.first, z.in.end-stepInput
	pos, acc, n := refill(in, z.in.pos, z.in.acc, z.in.n)
	e, end := literal[acc&(1<<literalBits-1)], uint32(0)
	for pos <= last && op < stop {
		// Up to three literals with codes in the first table take 33 of the
		// 56 bits; after two, 34 are left for a length and its extra bits.
		if e&flagLiteral != 0 {
			out[op] = byte(e >> 16)
			op++
			acc, n = use(acc, n, e)
			e = literal[acc&(1<<literalBits-1)]
			if e&flagLiteral != 0 {
				out[op] = byte(e >> 16)
				op++
				acc, n = use(acc, n, e)
				e = literal[acc&(1<<literalBits-1)]
				if e&flagLiteral != 0 {
					out[op] = byte(e >> 16)
					op++
					acc, n = use(acc, n, e)
					pos, acc, n = refill(in, pos, acc, n)
					e = literal[acc&(1<<literalBits-1)]
					continue
				}
			}
		}
		if e&flagLong != 0 {
			acc, n = use(acc, n, e)
			e = literal[(e>>16+subIndex(acc, e))&(literalSize-1)]
			if e&flagLiteral != 0 {
				out[op] = byte(e >> 16)
				op++
				acc, n = use(acc, n, e)
				pos, acc, n = refill(in, pos, acc, n)
				e = literal[acc&(1<<literalBits-1)]
				continue
			}
		}
		if e&flagStop != 0 {
			acc, n = use(acc, n, e)
			end = e
			break
		}
		length := value(acc, e)
		acc, n = use(acc, n, e)

		// A distance takes up to 28 bits.
		pos, acc, n = refill(in, pos, acc, n)
		d := distances[acc&(1<<distBits-1)]
		if d&flagLong != 0 {
			acc, n = use(acc, n, d)
			d = distances[(d>>16+subIndex(acc, d))&(distSize-1)]
		}
		if d&flagStop != 0 {
			return 0, z.in.corrupt("invalid distance code")
		}
		dist := value(acc, d)
		acc, n = use(acc, n, d)
		if dist > op-first {
			return 0, z.in.corrupt("match before the start")
		}
		// The next entry is on its way while the match is copied.
		pos, acc, n = refill(in, pos, acc, n)
		e = literal[acc&(1<<literalBits-1)]
		if dist >= 16 {
			// Writes up to 15 bytes too many, which the next symbol replaces.
			for i := 0; i < length; i += 16 {
				*(*[16]byte)(out[op+i:]) = *(*[16]byte)(out[op-dist+i:])
			}
		} else {
			repeat(out[:op+length], op, dist)
		}
		op += length
	}
	z.in.pos, z.in.acc, z.in.n = pos, acc&(1<<n-1), n
	z.end = op
	if end&flagBad != 0 {
		return 0, z.in.corrupt("invalid literal code")
	}
	return end, nil
}

// refill makes n at least 56. Bits of acc above n are either zero or what the
// stream has there, so that reading them again changes nothing.
func refill(in *[inputSize]byte, pos int, acc uint64, n uint) (int, uint64, uint) {
	acc |= binary.LittleEndian.Uint64(in[pos:]) << (n & 63)
	return pos + int((63-n)>>3), acc, n | 56
}

// use drops the bits of an entry, for a pointer those of the first table.
func use(acc uint64, n uint, e uint32) (uint64, uint) {
	return acc >> (e & 63), n - uint(e&63)
}

// subIndex is the place in the second table that pointer e leads to.
func subIndex(acc uint64, e uint32) uint32 { return uint32(acc) & (1<<(e>>8&15) - 1) }

// value is the length or distance of entry e whose bits come next.
func value(acc uint64, e uint32) int {
	return int(e>>16) + int(acc&(1<<(e&63)-1)>>(e>>8&15))
}

// repeat fills out from op on with the dist bytes before, over and over.
func repeat(out []byte, op, dist int) {
	for op < len(out) {
		op += copy(out[op:], out[op-dist:op])
	}
}
