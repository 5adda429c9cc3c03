package torture

import (
	"archive/tar"
	"bytes"
	"math/rand/v2"
	"time"
	"unicode/utf8"
)

// Tar writes one layer. Errors come out of the writer only for headers that
// this package got wrong, so they panic.
type Tar struct {
	buf bytes.Buffer
	w   *tar.Writer
}

// NewTar starts an empty layer.
func NewTar() *Tar {
	t := &Tar{}
	t.w = tar.NewWriter(&t.buf)
	return t
}

// Bytes ends the layer and returns it.
func (t *Tar) Bytes() []byte {
	check(t.w.Close())
	return t.buf.Bytes()
}

// Stamp is the modification time of everything that does not ask for another.
func Stamp() time.Time { return time.Unix(1_700_000_000, 123_456_789) }

// An Option changes a header.
type Option func(*tar.Header)

// Own sets owner and group.
func Own(uid, gid int) Option { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }

// Mode sets permission, set-id and sticky bits.
func Mode(m int64) Option { return func(h *tar.Header) { h.Mode = m } }

// At sets the modification time.
func At(sec, nsec int64) Option { return func(h *tar.Header) { h.ModTime = time.Unix(sec, nsec) } }

// Attr adds an extended attribute.
func Attr(name, value string) Option {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

func (t *Tar) put(h tar.Header, content []byte, options []Option) {
	h.ModTime = Stamp()
	h.Size = int64(len(content))
	for _, o := range options {
		o(&h)
	}
	h.Format = tar.FormatPAX
	if !utf8.ValidString(h.Name) || !utf8.ValidString(h.Linkname) {
		h.Format = tar.FormatGNU // PAX has only UTF-8; and GNU only whole seconds
		h.ModTime = h.ModTime.Truncate(time.Second)
	}
	check(t.w.WriteHeader(&h))
	_, err := t.w.Write(content)
	check(err)
}

// Dir adds a directory.
func (t *Tar) Dir(name string, o ...Option) {
	t.put(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}, nil, o)
}

// File adds a regular file.
func (t *Tar) File(name, content string, o ...Option) {
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, []byte(content), o)
}

// Random adds a regular file of n bytes that depend on its name.
func (t *Tar) Random(name string, n int, o ...Option) {
	t.File(name, string(noise(name, n)), o...)
}

// Symlink adds a symlink.
func (t *Tar) Symlink(name, target string, o ...Option) {
	t.put(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil, o)
}

// Link adds a hard link.
func (t *Tar) Link(name, target string) {
	t.put(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, nil, nil)
}

// Device adds a node: tar.TypeChar, TypeBlock or TypeFifo.
func (t *Tar) Device(kind byte, name string, major, minor int64, o ...Option) {
	t.put(tar.Header{Typeflag: kind, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}, nil, o)
}

// noise is n bytes that no two seeds share and that do not compress.
func noise(seed string, n int) []byte {
	var key [32]byte
	copy(key[:], seed)
	if len(seed) > 32 {
		copy(key[:], seed[len(seed)-32:])
	}
	b := make([]byte, n)
	_, err := rand.NewChaCha8(key).Read(b)
	check(err)
	return b
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
