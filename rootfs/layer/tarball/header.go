package tarball

import (
	"bytes"
	"errors"
	"fmt"
)

const blockSize = 512

// Type flags of headers (POSIX pax, GNU tar).
const (
	typeOldFile    = 0
	typeFile       = '0'
	typeHardlink   = '1'
	typeSymlink    = '2'
	typeChar       = '3'
	typeBlock      = '4'
	typeDir        = '5'
	typeFifo       = '6'
	typeContiguous = '7'
	typePax        = 'x'
	typePaxGlobal  = 'g'
	typeLongLink   = 'K'
	typeLongName   = 'L'
	typeSparse     = 'S'
)

// format is the family that a header block belongs to.
type format uint8

const (
	formatV7 format = iota
	formatUstar
	formatGNU
	formatStar
)

// header is one entry of the stream with its extended headers merged in.
type header struct {
	flag         byte
	name, link   string
	mode         int64
	uid, gid     int64
	sec          int64
	nsec         uint32
	major, minor int64
	size         int64 // of the file; of the stored data before sparse headers are applied
	pax          map[string]string

	// fragments are the parts of a sparse file that are stored, in order and
	// one behind the other; nil for a file that is stored whole.
	fragments []fragment
}

// fragment is a stored part of a sparse file.
type fragment struct{ off, n int64 }

// stored is how much data follows the header, in bytes.
func (h *header) stored() int64 {
	switch h.flag {
	case typeHardlink, typeSymlink, typeChar, typeBlock, typeDir, typeFifo:
		return 0 // whatever the size field says
	}
	return h.size
}

type block [blockSize]byte

// Fields of a header block that all formats share.
func (b *block) chksum() []byte { return b[148:156] }
func (b *block) flag() byte     { return b[156] }

// format tells the format by the magic, after checking the checksum.
func (b *block) format() (format, error) {
	if !b.sumsUp() {
		return 0, errors.New("wrong checksum: not a tar header")
	}
	switch magic := string(b[257:265]); {
	case magic == "ustar  \x00":
		return formatGNU, nil
	case magic[:6] == "ustar\x00" && string(b[508:512]) == "tar\x00":
		return formatStar, nil
	case magic[:6] == "ustar\x00":
		return formatUstar, nil
	}
	return formatV7, nil
}

// sumsUp compares the checksum. Sun's tar summed bytes as signed numbers.
func (b *block) sumsUp() bool {
	want, err := number(b.chksum())
	if err != nil || b.chksum()[0]&0x80 != 0 {
		return false
	}
	unsigned, signed := int64(8*' '), int64(8*' ')
	for i, c := range b {
		if i < 148 || i >= 156 {
			unsigned += int64(c)
			signed += int64(int8(c))
		}
	}
	return want == unsigned || want == signed
}

// parse reads the fields of a header block.
func (b *block) parse() (*header, format, error) {
	f, err := b.format()
	if err != nil {
		return nil, 0, err
	}
	h := &header{flag: b.flag(), name: text(b[0:100]), link: text(b[157:257])}
	fields := []struct {
		name string
		at   []byte
		to   *int64
	}{
		{"mode", b[100:108], &h.mode}, {"uid", b[108:116], &h.uid}, {"gid", b[116:124], &h.gid},
		{"size", b[124:136], &h.size}, {"time", b[136:148], &h.sec},
		{"device", b[329:337], &h.major}, {"device", b[337:345], &h.minor},
	}
	if f == formatV7 {
		fields = fields[:5]
	}
	for _, n := range fields {
		if *n.to, err = number(n.at); err != nil {
			return nil, 0, fmt.Errorf("%w in the %s field", err, n.name)
		}
	}
	if prefix := b.prefix(f); prefix != "" {
		h.name = prefix + "/" + h.name
	}
	return h, f, nil
}

// prefix is the part of the name that the format keeps in a second field.
func (b *block) prefix(f format) string {
	switch f {
	case formatUstar:
		return text(b[345:500])
	case formatStar:
		return text(b[345:476])
	case formatGNU:
		return b.gnuPrefix()
	}
	return ""
}

// gnuPrefix is for blocks that say GNU but have a ustar prefix where GNU has
// two times: Go before 1.8 wrote them (golang.org/issue/12594).
func (b *block) gnuPrefix() string {
	for _, field := range [...][]byte{b[345:357], b[357:369]} {
		if field[0] == 0 {
			continue
		}
		if _, err := number(field); err != nil {
			s := text(b[345:500])
			if bytes.ContainsFunc([]byte(s), func(r rune) bool { return r >= 0x80 }) {
				return ""
			}
			return s
		}
	}
	return ""
}
