package profile

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// version of the encoding.
const version = 1

// MaxEncoded bounds an encoded profile in bytes.
const MaxEncoded = 1 << 20

// maxSegments bounds the segments of one profile: an image has at most as many layers
// as its manifest has room for.
const maxSegments = 1024

// encoded is a profile as it is kept and published, in JSON. A part is an array: the
// number of its segment, offset, length, which starts read it, its place.
type encoded struct {
	Version    int        `json:"version"`
	Entrypoint string     `json:"entrypoint,omitempty"`
	Command    string     `json:"command,omitempty"`
	Source     Source     `json:"source"`
	Runs       int        `json:"runs"`
	Segments   []index.ID `json:"segments"`
	Parts      [][5]int64 `json:"parts"`
}

// Encode returns p in at most MaxEncoded bytes.
func Encode(p *Profile) ([]byte, error) {
	out := encoded{Version: version, Entrypoint: p.Entrypoint, Command: p.Command, Source: p.Source, Runs: p.Runs}
	number := map[index.ID]int64{}
	for _, k := range p.Parts {
		n, ok := number[k.Segment]
		if !ok {
			n = int64(len(out.Segments))
			number[k.Segment], out.Segments = n, append(out.Segments, k.Segment)
		}
		out.Parts = append(out.Parts, [5]int64{n, k.Off, k.Len, int64(k.Seen), int64(k.At)})
	}
	data, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("encode profile: %w", err)
	}
	return data, nil
}

// Decode reads what Encode wrote, or what somebody else did. It is of class DataLoss
// when it is no profile. That the parts are chunks of some image it does not know.
func Decode(data []byte) (*Profile, error) {
	var in encoded
	if len(data) > MaxEncoded {
		return nil, damaged("%d bytes are over %d", len(data), MaxEncoded)
	}
	if err := json.Unmarshal(data, &in); err != nil {
		return nil, damaged("%w", err)
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	p := &Profile{Entrypoint: in.Entrypoint, Command: in.Command, Source: in.Source, Runs: in.Runs}
	seen := map[place]bool{}
	for _, n := range in.Parts {
		k, err := in.part(n)
		if err != nil {
			return nil, err
		}
		if seen[place{k.Segment, k.Off}] {
			return nil, damaged("a part is there twice")
		}
		seen[place{k.Segment, k.Off}] = true
		p.Parts = append(p.Parts, k)
	}
	slices.SortFunc(p.Parts, Part.compare)
	return p, nil
}

func (e *encoded) check() error {
	switch {
	case e.Version != version:
		return damaged("version %d", e.Version)
	case !validKey(e.Entrypoint) || len(e.Command) > maxCommand || e.Command != Command([]string{e.Command}):
		return damaged("entrypoint %.64q, command %.64q", e.Entrypoint, e.Command)
	case e.Source != Recorded && e.Source != Imported && e.Source != Registry:
		return damaged("source %.64q", e.Source)
	case e.Runs < 0 || e.Runs > math.MaxInt32 || len(e.Parts) > MaxParts || len(e.Segments) > maxSegments:
		return damaged("%d runs, %d parts in %d segments", e.Runs, len(e.Parts), len(e.Segments))
	}
	for _, id := range e.Segments {
		if err := id.Validate(); err != nil {
			return damaged("segment %.80q: %w", id, err)
		}
	}
	return nil
}

func (e *encoded) part(n [5]int64) (Part, error) {
	segment, off, length, seen, at := n[0], n[1], n[2], n[3], n[4]
	switch {
	case segment < 0 || segment >= int64(len(e.Segments)):
		return Part{}, damaged("a part of segment %d of %d", segment, len(e.Segments))
	case off < 0 || length < 1 || length > index.MaxChunk || off > math.MaxInt64-length:
		return Part{}, damaged("a part of %d bytes at %d", length, off)
	case seen < 1 || seen > math.MaxUint8 || at < 0 || at > math.MaxUint32:
		return Part{}, damaged("a part seen %#x at %d", seen, at)
	}
	return Part{Range: Range{e.Segments[segment], off, length}, Seen: uint8(seen), At: uint32(at)}, nil
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("decode profile: %w: %w", fmt.Errorf(format, args...), errdefs.ErrDataLoss)
}
