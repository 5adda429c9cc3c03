package zstdchunked

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/layer/toc"
)

// Annotations of a layer in its manifest.
const (
	// Of podman, always both; the checksum is the digest of the compressed TOC.
	podmanChecksum = "io.github.containers.zstd-chunked.manifest-checksum"
	podmanPosition = "io.github.containers.zstd-chunked.manifest-position"
	// The names that they had at first (skopeo 1.9 writes them).
	oldChecksum = "io.containers.zstd-chunked.manifest-checksum"
	oldPosition = "io.containers.zstd-chunked.manifest-position"
	// Of stargz-snapshotter, beside the two old ones: the digest of the JSON.
	stargzDigest = "containerd.io/snapshot/stargz/toc.digest"
)

// anchor is what a manifest says of the TOC of a layer.
type anchor struct {
	sum    digest.Digest
	packed bool     // sum is of the compressed TOC, not of its JSON
	at     position // zero if only the footer tells
	marked bool     // made by stargz: see toc.Format
}

// TOC is the digest in a layer's annotations that identifies and binds its TOC.
// It is false when there is none, or when there are those of two blobs: tools
// that convert images leave behind what they do not know. Only layers with a
// media type of zstd may be asked for, as eStargz layers have annotations of the
// same name.
func TOC(annotations map[string]string) (digest.Digest, bool) {
	a, err := findAnchor(annotations)
	return a.sum, err == nil
}

// findAnchor sorts out which dialect's annotations there are.
func findAnchor(annotations map[string]string) (anchor, error) {
	_, podman := annotations[podmanChecksum]
	_, old := annotations[oldChecksum]
	_, stargz := annotations[stargzDigest]
	switch {
	case podman && old:
		return anchor{}, toc.Invalid(fmt.Errorf("annotations %s and %s are of two different blobs; convert the image again",
			podmanChecksum, oldChecksum))
	case podman:
		return readAnchor(annotations, podmanChecksum, podmanPosition, anchor{packed: true})
	case stargz:
		return readAnchor(annotations, stargzDigest, oldPosition, anchor{marked: true})
	case old:
		return readAnchor(annotations, oldChecksum, oldPosition, anchor{packed: true})
	}
	return anchor{}, toc.Invalid(fmt.Errorf("no annotation %s, %s or %s", podmanChecksum, stargzDigest, oldChecksum))
}

// readAnchor fills in digest and position. Only stargz's digest, which is not of
// the compressed TOC, can do without a position.
func readAnchor(annotations map[string]string, sum, pos string, a anchor) (anchor, error) {
	var err error
	if a.sum, err = digest.Parse(annotations[sum]); err != nil {
		return anchor{}, toc.Invalid(fmt.Errorf("annotation %s: %.80q: %w", sum, annotations[sum], err))
	}
	text, ok := annotations[pos]
	if !ok && !a.packed {
		return a, nil
	}
	if a.at, err = parsePosition(text); err != nil {
		return anchor{}, toc.Invalid(fmt.Errorf("annotation %s: %.80q: %w", pos, text, err))
	}
	return a, nil
}

// position is where a TOC is in its blob, in bytes.
type position struct {
	off, len int64
	plain    int64 // length of the JSON
}

// tocType is the only type of TOC that there is.
const tocType = 1

// parsePosition reads offset, length, plain length and type, with colons
// between them.
func parsePosition(s string) (position, error) {
	fields := strings.Split(s, ":")
	if len(fields) != 4 {
		return position{}, fmt.Errorf("%d numbers, not 4", len(fields))
	}
	var v [4]int64
	for i, f := range fields {
		n, err := strconv.ParseUint(f, 10, 63)
		if err != nil {
			return position{}, err
		}
		v[i] = int64(n)
	}
	return newPosition(v)
}

// newPosition checks all of a position that can be without the blob.
func newPosition(v [4]int64) (position, error) {
	p := position{off: v[0], len: v[1], plain: v[2]}
	switch {
	case v[3] != tocType:
		return p, fmt.Errorf("unknown type of TOC %d", v[3])
	case p.off < frameHeader || p.len <= 0 || p.len > toc.MaxSize:
		return p, fmt.Errorf("TOC of %d bytes at byte %d", p.len, p.off)
	case p.plain <= 0 || p.plain > toc.Limit(p.len):
		return p, fmt.Errorf("TOC of %d bytes, compressed to %d", p.plain, p.len)
	}
	return p, nil
}
