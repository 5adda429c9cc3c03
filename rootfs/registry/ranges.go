package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Range reads bytes [off, off+n) of a blob. The first request is made before
// it returns; a body that ends early or stalls is resumed while being read.
// The reader gives exactly n bytes or an error; their content is not verified.
//
// A server that ignores Range headers sends the blob from its start: the bytes
// before off are read and dropped. After that Ranged is false for a while, and
// Open is the cheaper way to the blob.
func (r *Repository) Range(ctx context.Context, dgst digest.Digest, off, n int64) (io.ReadCloser, error) {
	return r.open(ctx, piece{kind: "blobs", digest: dgst, off: off, end: end(off, n), size: -1})
}

// SegmentRange reads plain bytes [off, off+n) of the segment with this ID. Only
// the host's relay has segments. It has asked a registry several times before it
// answers with an error, so that is not tried again here.
func (r *Repository) SegmentRange(ctx context.Context, id digest.Digest, off, n int64) (io.ReadCloser, error) {
	return r.open(ctx, piece{kind: "segments", digest: id, off: off, end: end(off, n), size: -1})
}

// Ranged is false while the registry is known to ignore Range headers: many
// small ranges of one blob are better replaced by one Open then.
func (r *Repository) Ranged() bool {
	hosts := r.hosts(CanPull)
	return len(hosts) == 0 || slices.ContainsFunc(hosts, func(one *Repository) bool {
		return !r.client.hosts.rangeless(one.host) && (one.last || !one.down())
	})
}

// LayerBlob is one blob as layers read it: ranges of known total size.
type LayerBlob struct {
	repo *Repository
	desc ocispec.Descriptor
}

// LayerBlob returns the blob that desc names; it sends nothing yet.
func (r *Repository) LayerBlob(desc ocispec.Descriptor) *LayerBlob {
	return &LayerBlob{repo: r, desc: desc}
}

// Size is the size that the descriptor gives, in bytes.
func (b *LayerBlob) Size() int64 { return b.desc.Size }

// ReadRange reads bytes [off, off+n) as Repository.Range does, and checks the
// blob's size whenever the registry tells it.
func (b *LayerBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	p := piece{kind: "blobs", digest: b.desc.Digest, off: off, end: end(off, n), size: b.desc.Size}
	if p.end > p.size {
		return nil, b.repo.fault(p.object(), errdefs.ErrOutOfRange, fmt.Errorf("the range [%d, %d) is not in its %d bytes", off, p.end, p.size))
	}
	return b.repo.open(ctx, p)
}

// piece is a range of a blob or segment.
type piece struct {
	kind     string
	digest   digest.Digest
	off, end int64 // bytes
	size     int64 // of the whole blob as its descriptor says, bytes; -1 when not known
}

// end is off+n, or -1 when that is no range.
func end(off, n int64) int64 {
	if off < 0 || n < 0 || n > math.MaxInt64-off {
		return -1
	}
	return off + n
}

func (p piece) query() query {
	q := query{method: http.MethodGet, kind: p.kind, ref: p.digest.String()}
	if p.end > 0 {
		q.ranges = fmt.Sprintf("bytes=%d-%d", p.off, p.end-1)
	}
	return q
}

// final marks an error answer that whoever asks is not to try again.
func (p piece) final(err error) error {
	var e *Error
	if p.kind == "segments" && errors.As(err, &e) && e.Status != 0 {
		e.temporary = false
	}
	return err
}

func (p piece) object() string { return p.query().object() }

func (r *Repository) open(ctx context.Context, p piece) (*rangeReader, error) {
	if err := p.digest.Validate(); err != nil {
		return nil, r.fault(p.object(), errdefs.ErrInvalidArgument, err)
	}
	if p.end < 0 {
		return nil, r.fault(p.object(), errdefs.ErrInvalidArgument, errors.New("the range does not fit"))
	}
	rr := newRangeReader(ctx, r, p)
	if p.off == p.end {
		return rr, nil
	}
	if err := rr.ask(); err != nil {
		rr.hedge.close()
		return nil, err
	}
	return rr, nil
}

// ranged asks for p once, at the blob's redirect target when there is one. The
// body of the answer starts at p.off. whole is true when it goes on to the end
// of the blob instead of p.end.
func (r *Repository) ranged(ctx context.Context, p piece) (body io.ReadCloser, whole bool, err error) {
	if r.tooFar(p) && r.client.hosts.rangeless(r.host) {
		return nil, false, r.fault(p.object(), errdefs.ErrNotImplemented, errRangeless)
	}
	resp, err := r.sendRanged(ctx, p)
	if err != nil {
		return nil, false, p.final(err)
	}
	if resp.StatusCode == http.StatusOK {
		body, err = r.skip(p, resp)
		return body, true, err
	}
	if err := r.checkPartial(p, resp); err != nil {
		_ = resp.Body.Close() // the answer is refused anyway
		return nil, false, err
	}
	r.client.hosts.set(r.host, func(s *hostState) { s.rangeless = time.Time{} })
	return resp.Body, false, nil
}

func (r *Repository) sendRanged(ctx context.Context, p piece) (*http.Response, error) {
	q := p.query()
	blob := targetKey(ctx, r.url(q))
	if known := r.client.targets.get(blob); known != "" {
		resp, err := r.sendTo(ctx, q, known, http.StatusOK, http.StatusPartialContent)
		if err == nil || ctx.Err() != nil {
			return resp, err
		}
		// Expired, moved or down: the registry knows what is right now.
		r.client.targets.forget(blob, known)
		r.client.log.Debug("redirect target is given up", "registry", r.host, "repository", r.Name(), "error", err)
		var e *Error
		if errors.As(err, &e) && e.temporary {
			return nil, err // after a pause
		}
	}
	resp, err := r.send(ctx, q, http.StatusOK, http.StatusPartialContent)
	if err != nil {
		return nil, err
	}
	if final := resp.Request.URL; final.Scheme != r.scheme || final.Host != r.host {
		r.client.targets.put(blob, final.String())
	}
	return resp, nil
}

// skip makes the body of a whole blob start at p.off.
func (r *Repository) skip(p piece, resp *http.Response) (io.ReadCloser, error) {
	if p.size >= 0 && resp.ContentLength >= 0 && resp.ContentLength != p.size {
		_ = resp.Body.Close() // the answer is refused anyway
		return nil, r.dataLoss(p.object(), "the registry has %d bytes, the descriptor says %d", resp.ContentLength, p.size)
	}
	if p.off != 0 || resp.ContentLength != p.end {
		r.rangeIgnored()
	}
	if r.tooFar(p) {
		_ = resp.Body.Close() // the next host is asked
		return nil, r.fault(p.object(), errdefs.ErrNotImplemented, errRangeless)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, p.off); err != nil {
		_ = resp.Body.Close() // the answer is refused anyway
		return nil, r.bodyError(p.object(), noEOF(err))
	}
	return resp.Body, nil
}

// maxSkip is how many bytes of a blob that a mirror sends from its start are
// dropped on the way to a range, before it is cheaper to ask the next host.
const maxSkip = 1 << 20

var errRangeless = errors.New("the mirror ignores Range headers")

// tooFar tells whether p is better asked of another host, should this one send
// the blob from its start. A proxy cache does so while it does not have the
// blob; it gets whole blobs and the beginnings of blobs all the same.
func (r *Repository) tooFar(p piece) bool { return !r.last && p.off > maxSkip }

func (r *Repository) rangeIgnored() {
	if !r.client.hosts.rangeless(r.host) {
		r.client.log.Warn("registry ignores Range headers: blobs are read from their start", "registry", r.host)
	}
	r.client.hosts.set(r.host, func(s *hostState) { s.rangeless = time.Now().Add(rangelessFor) })
}

// checkPartial compares a 206 answer with p. It may end before p.end, as RFC
// 9110 (15.3.7) allows; the rest is asked for later.
func (r *Repository) checkPartial(p piece, resp *http.Response) error {
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return r.dataLoss(p.object(), "the answer is encoded (%s), which no range can be", clean(enc))
	}
	value := resp.Header.Get("Content-Range")
	first, last, total, err := parseContentRange(value)
	if err != nil || first != p.off || last >= p.end {
		e := r.dataLoss(p.object(), "asked for bytes %d-%d, got Content-Range %q", p.off, p.end-1, clean(value))
		e.temporary = true
		return e
	}
	if p.size >= 0 && total >= 0 && total != p.size {
		return r.dataLoss(p.object(), "the registry has %d bytes, the descriptor says %d", total, p.size)
	}
	if total >= 0 && total < p.end {
		return r.fault(p.object(), errdefs.ErrOutOfRange, fmt.Errorf("asked for bytes %d-%d of %d", p.off, p.end-1, total))
	}
	return nil
}

// parseContentRange parses "bytes first-last/total" (RFC 9110, 14.4); total is
// -1 for "*". 0 <= first <= last < total holds for what it returns.
func parseContentRange(s string) (first, last, total int64, err error) {
	bad := fmt.Errorf("Content-Range %q is not a range of bytes", clean(s))
	rest, ok := strings.CutPrefix(s, "bytes ")
	ends, size, ok2 := strings.Cut(rest, "/")
	from, to, ok3 := strings.Cut(ends, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, 0, bad
	}
	total = -1
	if size != "*" {
		if total, err = parseInt(size); err != nil {
			return 0, 0, 0, bad
		}
	}
	first, err1 := parseInt(from)
	last, err2 := parseInt(to)
	if err1 != nil || err2 != nil || first > last || (total >= 0 && last >= total) {
		return 0, 0, 0, bad
	}
	return first, last, total, nil
}

// parseInt takes digits only, unlike strconv.ParseInt. The largest number is
// left out so that one more still fits.
func parseInt(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err == nil && n == math.MaxInt64 {
		err = strconv.ErrRange
	}
	return int64(n), err
}

// noEOF makes an early end of a body an error.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
