package ociserve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Opener returns the bytes [off, off+n) of an object.
type Opener func(ctx context.Context, off, n int64) (io.ReadCloser, error)

// Object sends an object of the kind, or the range of it that was asked for.
func (s *Server) Object(w http.ResponseWriter, req *http.Request, kind string, desc ocispec.Descriptor, open Opener) error {
	h := w.Header()
	h.Set("Accept-Ranges", "bytes")
	off, n, partial, err := parseRange(req.Header.Values("Range"), desc.Size)
	if err != nil {
		h.Set("Content-Range", fmt.Sprintf("bytes */%d", desc.Size))
		return err
	}
	status := http.StatusOK
	if partial {
		status = http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, desc.Size))
	}
	h.Set("Content-Type", desc.MediaType)
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	h.Set("Docker-Content-Digest", desc.Digest.String())
	h.Set("ETag", `"`+desc.Digest.String()+`"`)
	if req.Method == http.MethodHead || n == 0 {
		w.WriteHeader(status)
		return nil
	}
	body, err := open(req.Context(), off, n)
	if err == nil {
		defer body.Close()
		err = s.stream(req.Context(), w, status, body, n)
	}
	if err != nil {
		clearBody(h)
		return fmt.Errorf("send %s/%s [%d,%d): %w", kind, desc.Digest, off, off+n, err)
	}
	return nil
}

// clearBody takes back what was said of a body that will not come.
func clearBody(h http.Header) {
	for _, key := range []string{"Content-Range", "Content-Length", "Docker-Content-Digest", "ETag", "Accept-Ranges"} {
		h.Del(key)
	}
}

// Mapped is a body whose bytes lie in a file, or some of them: those are sent from
// there by the kernel, without a copy in this process.
type Mapped interface {
	// Map says where the next bytes are, n of them at off in f. n is 0 when they have
	// to be read.
	Map() (f *os.File, off, n int64)
	// Sent says that n bytes were sent from where Map said. It fails when they may have
	// been other ones, because the file has changed meanwhile.
	Sent(n int64) error
}

const (
	// minSpan is from how many bytes on it is worth it to send from a file.
	minSpan = 64 << 10
	// maxSpan is how many are sent with one deadline when nothing is waited for.
	maxSpan = 1 << 20
	// maxTurn is how long a client may take for a piece while others wait for theirs.
	maxTurn = 20 * time.Millisecond
)

// sending is one answer under way.
type sending struct {
	ctx    context.Context
	s      *Server
	w      http.ResponseWriter
	files  io.ReaderFrom // w, when it takes files; else nil
	status int
	body   io.Reader
	begun  bool
	left   int64 // bytes
}

// stream sends n bytes to the client. The status is sent when the first of
// them are there, so that a source that is down is still an error answer.
func (s *Server) stream(ctx context.Context, w http.ResponseWriter, status int, body io.Reader, n int64) error {
	o := &sending{ctx: ctx, s: s, w: w, status: status, body: body, left: n}
	mapped, ok := body.(Mapped)
	if ok {
		o.files, _ = w.(io.ReaderFrom)
	}
	for o.left > 0 {
		sent := false
		var err error
		if o.files != nil {
			sent, err = o.fromFile(mapped)
		}
		if !sent && err == nil {
			err = o.copy()
		}
		if err == nil && o.left > 0 {
			err = ctx.Err()
		}
		if err != nil && o.begun {
			return Broken(err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// begin sends what comes before the body, unless that was done.
func (o *sending) begin() error {
	if !o.begun {
		o.w.WriteHeader(o.status)
		o.begun = true
	}
	return o.s.deadline(o.w)
}

// sent counts n bytes.
func (o *sending) sent(n int64) {
	o.s.cfg.Sent.Add(n)
	o.left -= n
}

// copy reads and sends one piece.
func (o *sending) copy() error {
	buf := pieces.Get().(*[piece]byte)
	defer pieces.Put(buf)
	n, err := read(o.body, buf[:min(o.left, piece)])
	if err != nil {
		return err
	}
	leave, err := o.s.cfg.Queue.Brief(o.ctx, maxTurn)
	if err != nil {
		return err
	}
	defer leave()
	if err := o.begin(); err != nil {
		return err
	}
	if _, err := o.w.Write(buf[:n]); err != nil {
		return err
	}
	o.sent(int64(n))
	return nil
}

// fromFile sends the next bytes from the file that has them. It is false when they
// have to be copied.
func (o *sending) fromFile(body Mapped) (bool, error) {
	f, off, n := body.Map()
	n = min(n, o.left, maxSpan)
	if n < minSpan {
		return false, nil
	}
	if o.s.cfg.Queue != nil {
		n = min(n, piece)
	}
	leave, err := o.s.cfg.Queue.Brief(o.ctx, maxTurn)
	if err != nil {
		return false, err
	}
	defer leave()
	if !o.begun {
		if err := o.begin(); err != nil {
			return false, err
		}
		// Else net/http copies the first bytes, to go with the header.
		if err := http.NewResponseController(o.w).Flush(); err != nil {
			return false, err
		}
	}
	if err := o.s.deadline(o.w); err != nil {
		return false, err
	}
	m, err := o.files.ReadFrom(&span{f, off, n})
	if m == 0 && errors.Is(err, errGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if m != n {
		return false, io.ErrUnexpectedEOF
	}
	o.sent(n)
	return true, body.Sent(n)
}

// read returns at least one byte or an error.
func read(r io.Reader, p []byte) (int, error) {
	n, err := io.ReadAtLeast(r, p, 1)
	if n > 0 {
		return n, nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return 0, err
}

// parseRange reads a Range header (RFC 9110, section 14.2) of an object of size
// bytes. Several ranges, which the specification lets a server ignore, and
// malformed ones are refused: ignoring them would send the whole object.
func parseRange(header []string, size int64) (off, n int64, partial bool, err error) {
	if len(header) == 0 {
		return 0, size, false, nil
	}
	malformed := &Failure{Status: http.StatusBadRequest, Code: "RANGE_INVALID", Message: "give one range: bytes=first-last, bytes=first- or bytes=-length"}
	spec, ok := strings.CutPrefix(header[0], "bytes=")
	first, last, dash := strings.Cut(spec, "-")
	if !ok || !dash || len(header) > 1 || (first == "" && last == "") {
		return 0, 0, false, malformed
	}
	a, okA := number(first, 0)
	b, okB := number(last, size-1)
	if !okA || !okB || (first != "" && last != "" && b < a) {
		return 0, 0, false, malformed
	}
	if first == "" {
		a, b = max(0, size-b), size-1 // the last b bytes
	}
	if a >= size {
		return 0, 0, false, &Failure{Status: http.StatusRequestedRangeNotSatisfiable, Code: "RANGE_INVALID",
			Message: fmt.Sprintf("the range begins behind the end (%d bytes)", size)}
	}
	return a, min(b, size-1) - a + 1, true, nil
}

// number parses decimal digits only; empty is absent.
func number(s string, absent int64) (int64, bool) {
	if s == "" {
		return absent, true
	}
	v, err := strconv.ParseUint(s, 10, 63)
	return int64(v), err == nil
}
