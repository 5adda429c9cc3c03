package gzip

// A decoding table is indexed by the next bits of the stream. Its first
// 1<<primary entries answer for codes of up to primary bits; longer codes go
// through a second table that the first one points to. Entries are
//
//	literal    flagLiteral | byte<<16            | total
//	length     base<<16    | code bits<<8        | total
//	distance   base<<16    | code bits<<8        | total
//	pointer    start<<16   | index bits<<8 | flagLong | primary
//	others     flagStop, with flagBad unless it is the end of the block
//
// where total counts the bits to use up, extra bits included, and code bits
// those before the extra bits.
const (
	flagLiteral = 1 << 31
	flagLong    = 1 << 15
	flagStop    = 1 << 14
	flagBad     = 1 << 13

	bad = flagStop | flagBad
)

// Sizes of the tables. The primary sizes make first-table misses rare while
// both tables stay in the L1 cache; the arrays are the next powers of two above
// what the worst complete codes need (2342 and 402 entries), so that masking an
// index proves it in range.
const (
	literalBits = 11
	distBits    = 8
	codeBits    = 7

	literalSize = 4096
	distSize    = 512

	maxCode = 15 // bits of the longest code
)

// Limits of the alphabets. 286 and 287, 30 and 31 exist in the fixed codes but
// are never valid symbols.
const (
	endOfBlock  = 256
	maxLiterals = 286
	maxDists    = 30
	maxSymbols  = 288
)

var lengthBase = [...]uint16{
	3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31,
	35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258,
}

var lengthExtra = [...]uint8{
	0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2,
	3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
}

// literalEntry is the entry for a symbol of the literal and length alphabet
// whose code (or what is left of it) has n bits.
func literalEntry(sym, n uint32) uint32 {
	switch {
	case sym < endOfBlock:
		return flagLiteral | sym<<16 | n
	case sym == endOfBlock:
		return flagStop | n
	case sym < maxLiterals:
		i := sym - endOfBlock - 1
		return uint32(lengthBase[i])<<16 | n<<8 | (n + uint32(lengthExtra[i]))
	}
	return bad
}

// distEntry is the entry for a symbol of the distance alphabet.
func distEntry(sym, n uint32) uint32 {
	switch {
	case sym >= maxDists:
		return bad
	case sym < 4:
		return (sym+1)<<16 | n<<8 | n
	}
	extra := sym/2 - 1
	return (1+(2+sym&1)<<extra)<<16 | n<<8 | (n + extra)
}

// codeEntry is the entry for a symbol of the code length alphabet.
func codeEntry(sym, n uint32) uint32 { return sym<<16 | n<<8 | n }

// A code is a canonical Huffman code being turned into a table.
type code struct {
	count  [maxCode + 1]int   // symbols of each length
	sorted [maxSymbols]uint16 // symbols by length, then value
	max    int                // longest length in use
}

// read takes in the lengths, one for each symbol. It is false unless the code
// is complete, empty, or the single one-bit code that zlib emits too.
func (c *code) read(lens []uint8) bool {
	c.count = [maxCode + 1]int{}
	for _, n := range lens {
		c.count[n&maxCode]++
	}
	c.count[0], c.max = 0, 0
	used := 0
	var next [maxCode + 1]int
	for n := 1; n <= maxCode; n++ {
		used = used<<1 + c.count[n]
		if n < maxCode {
			next[n+1] = next[n] + c.count[n]
		}
		if c.count[n] > 0 {
			c.max = n
		}
		if used > 1<<n {
			return false
		}
	}
	for sym, n := range lens {
		if n > 0 {
			c.sorted[next[n&maxCode]] = uint16(sym)
			next[n&maxCode]++
		}
	}
	return c.max == 0 || used == 1<<maxCode || c.max == 1 && c.count[1] == 1
}

// build fills t with the code that lens describe, and reports whether it is
// one that a stream may use.
func (c *code) build(t []uint32, primary int, lens []uint8, entry func(sym, n uint32) uint32) bool {
	if !c.read(lens) {
		return false
	}
	if c.max == 0 || c.max == 1 && c.count[1] == 1 {
		for i := range 1 << primary {
			t[i] = bad
		}
	}
	rev, done := c.fillPrimary(t, primary, entry)
	if c.max > primary {
		c.fillLong(t, primary, rev, done, entry)
	}
	return true
}

// fillPrimary writes the codes of up to primary bits. The table doubles with
// each length, which repeats shorter codes for every value of the bits behind
// them. It returns the next code, bit-reversed, and how many symbols it placed.
func (c *code) fillPrimary(t []uint32, primary int, entry func(sym, n uint32) uint32) (rev uint32, done int) {
	for n := 1; n <= primary; n++ {
		if half := 1 << (n - 1); n > 1 {
			copy(t[half:2*half], t[:half])
		}
		for range c.count[n] {
			t[rev] = entry(uint32(c.sorted[done]), uint32(n))
			done++
			rev = nextCode(rev, n)
		}
	}
	return rev, done
}

// fillLong writes the codes longer than primary bits into tables behind the
// first one, each as small as the codes that share its prefix allow.
func (c *code) fillLong(t []uint32, primary int, rev uint32, done int, entry func(sym, n uint32) uint32) {
	mask := uint32(1)<<primary - 1
	prefix, start, free := uint32(1)<<primary, 0, 1<<primary
	index := 0 // bits that index the current table
	for n := primary + 1; n <= c.max; n++ {
		for ; c.count[n] > 0; c.count[n]-- {
			if rev&mask != prefix {
				prefix, start = rev&mask, free
				index = c.indexBits(n, primary)
				free += 1 << index
				t[prefix] = uint32(start)<<16 | flagLong | uint32(index)<<8 | uint32(primary)
			}
			e := entry(uint32(c.sorted[done]), uint32(n-primary))
			done++
			for i := int(rev >> primary); i < 1<<index; i += 1 << (n - primary) {
				t[start+i] = e
			}
			rev = nextCode(rev, n)
		}
	}
}

// indexBits is the size of a second table whose shortest code has n bits: it
// ends where the codes that are left, in canonical order, have filled it.
func (c *code) indexBits(n, primary int) int {
	k := n - primary
	for used := c.count[n]; used < 1<<k && primary+k < c.max; {
		k++
		used = used<<1 + c.count[primary+k]
	}
	return k
}

// nextCode adds one to an n-bit code that is stored with its bits reversed.
func nextCode(rev uint32, n int) uint32 {
	bit := uint32(1) << (n - 1)
	for rev&bit != 0 {
		rev ^= bit
		bit >>= 1
	}
	return rev | bit
}
