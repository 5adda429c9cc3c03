package gzip

// header reads the header of a block and prepares for its body.
func (z *inflater) header() error {
	h, err := z.in.take(3)
	if err != nil {
		return err
	}
	z.last = h&1 != 0
	switch h >> 1 {
	case 0:
		return z.storedHeader()
	case 1:
		return z.fixedHeader()
	case 2:
		return z.dynamicHeader()
	}
	return z.in.corrupt("unknown block type")
}

// storedHeader reads the length of a stored block and its complement.
func (z *inflater) storedHeader() error {
	z.in.align()
	v, err := z.in.take(32)
	if err != nil {
		return err
	}
	if v&0xffff != ^v>>16 {
		return z.in.corrupt("invalid length of a stored block")
	}
	z.left, z.state = int(v&0xffff), inStored
	if z.left == 0 {
		z.endBlock()
	}
	return nil
}

// stored copies bytes of a stored block until its end, or z.end is at stop.
func (z *inflater) stored(stop int) error {
	in := &z.in
	for z.left > 0 && z.end < stop {
		if in.n > 0 { // whole bytes, read ahead as bits
			z.out[z.end] = byte(in.acc)
			in.drop(8)
			z.end++
			z.left--
			continue
		}
		if in.pos == in.end && !in.fill() {
			return in.ended()
		}
		k := copy(z.out[z.end:min(stop, z.end+z.left)], in.buf[in.pos:in.end])
		in.pos += k
		z.end += k
		z.left -= k
	}
	if z.left == 0 {
		z.endBlock()
	}
	return nil
}

// fixedHeader sets up the codes that the specification fixes.
func (z *inflater) fixedHeader() error {
	z.state = inCodes
	if z.fixed {
		return nil
	}
	var lens [maxSymbols]uint8
	for i := range lens {
		switch {
		case i < 144:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		case i < 280:
			lens[i] = 7
		default:
			lens[i] = 8
		}
	}
	z.code.build(z.literal[:], literalBits, lens[:], literalEntry)
	for i := range 32 {
		lens[i] = 5
	}
	z.code.build(z.dist[:], distBits, lens[:32], distEntry)
	z.fixed = true
	return nil
}

// codeOrder is the order in which the code length code's own lengths come.
var codeOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamicHeader reads the codes of a block that brings its own.
func (z *inflater) dynamicHeader() error {
	v, err := z.in.take(14)
	if err != nil {
		return err
	}
	literals, dists, codes := int(v&31)+257, int(v>>5&31)+1, int(v>>10)+4
	if literals > maxLiterals || dists > maxDists {
		return z.in.corrupt("too many codes")
	}
	var codeLens [len(codeOrder)]uint8
	for _, sym := range codeOrder[:codes] {
		n, err := z.in.take(3)
		if err != nil {
			return err
		}
		codeLens[sym] = uint8(n)
	}
	z.fixed = false
	// The distance table is free until the lengths are known.
	if !z.code.build(z.dist[:], codeBits, codeLens[:], codeEntry) {
		return z.in.corrupt("invalid code length code")
	}
	var lens [maxLiterals + maxDists]uint8
	if err := z.codeLengths(lens[:literals+dists]); err != nil {
		return err
	}
	if lens[endOfBlock] == 0 {
		return z.in.corrupt("block without an end")
	}
	if !z.code.build(z.literal[:], literalBits, lens[:literals], literalEntry) {
		return z.in.corrupt("invalid literal code")
	}
	if !z.code.build(z.dist[:], distBits, lens[literals:literals+dists], distEntry) {
		return z.in.corrupt("invalid distance code")
	}
	z.state = inCodes
	return nil
}

// codeLengths reads the lengths of both codes, which are run-length encoded.
func (z *inflater) codeLengths(lens []uint8) error {
	for i := 0; i < len(lens); {
		sym, err := z.symbol(z.dist[:], codeBits)
		if err != nil {
			return err
		}
		if sym < 16 {
			lens[i] = uint8(sym)
			i++
			continue
		}
		if sym == 16 && i == 0 {
			return z.in.corrupt("repeat of no code length")
		}
		n, err := z.repeats(sym)
		if err != nil {
			return err
		}
		if n > len(lens)-i {
			return z.in.corrupt("too many code lengths")
		}
		if sym == 16 {
			for k := range n {
				lens[i+k] = lens[i-1]
			}
		}
		i += n
	}
	return nil
}

// repeats reads how often a repeat symbol of the code length code repeats.
func (z *inflater) repeats(sym int) (int, error) {
	bits, least := uint(2), 3
	switch sym {
	case 17:
		bits = 3
	case 18:
		bits, least = 7, 11
	}
	v, err := z.in.take(bits)
	return int(v) + least, err
}

// symbol decodes one code without reading behind the end of the input, and
// returns the base value plus extra bits of its entry.
func (z *inflater) symbol(t []uint32, primary uint) (int, error) {
	e, err := z.entry(t, primary)
	if err != nil {
		return 0, err
	}
	if e&flagStop != 0 {
		return 0, z.in.corrupt("invalid code")
	}
	v := value(z.in.acc, e)
	z.in.drop(uint(e & 63))
	return v, nil
}

// entry finds the entry of the next code. Its bits are there but not used up.
func (z *inflater) entry(t []uint32, primary uint) (uint32, error) {
	z.in.need(48) // fewer at the end of the stream: zeros stand for the rest
	e := t[z.in.acc&(1<<primary-1)]
	if e&flagLong != 0 && z.in.n >= primary {
		z.in.drop(primary)
		e = t[e>>16+subIndex(z.in.acc, e)]
	}
	if uint(e&63) > z.in.n || e&flagLong != 0 {
		return 0, z.in.ended()
	}
	return e, nil
}

// slow decodes one symbol when too little input is buffered for fast. It
// returns the symbol's entry.
func (z *inflater) slow() (uint32, error) {
	e, err := z.entry(z.literal[:], literalBits)
	if err != nil {
		return 0, err
	}
	if e&flagBad != 0 && e&flagStop != 0 {
		return 0, z.in.corrupt("invalid literal code")
	}
	length := value(z.in.acc, e)
	z.in.drop(uint(e & 63))
	switch {
	case e&flagLiteral != 0:
		z.out[z.end] = byte(e >> 16)
		z.end++
		return e, nil
	case e&flagStop != 0:
		return e, nil
	}
	dist, err := z.symbol(z.dist[:], distBits)
	if err != nil {
		return 0, err
	}
	if dist > z.end-z.first {
		return 0, z.in.corrupt("match before the start")
	}
	repeat(z.out[:z.end+length], z.end, dist)
	z.end += length
	return e, nil
}
