// Package profile is what starts of an image read first, so that it can be there
// before it is asked for the next time. It knows no store and no registry.
//
// A start is a list of parts of segments, in the order in which they were read
// first; a part is one chunk. Starts are merged: of each part a profile knows which of
// the last eight starts read it, and its mean place among what they read. What less
// than a quarter of them read is kept, as it may become more, and not replayed.
//
// A guest may report anything. What it reports becomes at most a prefetch of chunks of
// its own image, bounded in number and bytes; and where there is no room for all, what
// many starts read stays.
package profile

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"math"
	"math/bits"
	"slices"
	"strings"
	"unicode"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Bounds of a profile.
const (
	MaxParts = 8192
	maxBytes = 256 << 20
	minBytes = 16 << 20 // of small images all may be read
)

// history is how many starts are told apart.
const history = 8

// MaxBytes is how many bytes of an image of the given size a profile may have: half of
// it, within bounds.
func MaxBytes(image int64) int64 { return min(maxBytes, max(minBytes, image/2)) }

// Source says where a profile comes from.
type Source string

// Sources.
const (
	Recorded Source = "recorded" // starts on this node
	Imported Source = "imported" // a list of paths
	Registry Source = "registry" // published beside the image
)

// Range is a part of a segment; bytes.
type Range struct {
	Segment  index.ID
	Off, Len int64
}

// End is the offset behind the range.
func (r Range) End() int64 { return r.Off + r.Len }

// Part is one chunk that starts read.
type Part struct {
	Range
	Seen uint8  // bit k: the start k before the last one read it
	At   uint32 // mean place in the order of first reads, in parts of 256
}

// Profile of an image, for one command or for all.
type Profile struct {
	Entrypoint string // Key of the command; "" for all commands together
	Command    string // for people; see Command
	Source     Source
	Runs       int    // starts that it is made of
	Parts      []Part // by At; no two have the same place in a segment
}

// Key tells commands of one image apart: the words of a command, from its path on.
// Without words it is "", which is that of all commands.
func Key(args []string) string {
	if len(args) == 0 {
		return ""
	}
	sum := sha256.Sum256([]byte(strings.Join(args, "\x00")))
	return hex.EncodeToString(sum[:keyLen])
}

const keyLen = 8 // bytes of a digest

// validKey says whether k may be one of Key; such a name is a plain file name.
func validKey(k string) bool {
	b, err := hex.DecodeString(k)
	return k == "" || err == nil && len(b) == keyLen && k == strings.ToLower(k)
}

// maxCommand bounds what is shown of a command in bytes.
const maxCommand = 64

// Command is what is shown of a command: its first word. The others may be secret.
func Command(args []string) string {
	if len(args) == 0 {
		return ""
	}
	word := strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, args[0])
	return strings.ToValidUTF8(word[:min(len(word), maxCommand)], "") // a word cut in a letter
}

// place is where a part is; segments of equal digest are the same bytes.
type place struct {
	segment index.ID
	off     int64
}

// Add merges a start, of at most limit bytes. Of a partial one it is not known what
// else was read: it makes nothing older.
func (p *Profile) Add(start []Range, limit int64, partial bool) {
	if len(start) == 0 {
		return
	}
	if !partial || p.Runs == 0 {
		p.Runs = min(p.Runs+1, math.MaxInt32) // as Decode takes it
		for i := range p.Parts {
			p.Parts[i].Seen <<= 1
		}
	}
	at := make(map[place]int, len(p.Parts))
	for i, k := range p.Parts {
		at[place{k.Segment, k.Off}] = i
	}
	for n, r := range cut(start, limit) {
		key := place{r.Segment, r.Off}
		i, ok := at[key]
		if !ok {
			i = len(p.Parts)
			at[key], p.Parts = i, append(p.Parts, Part{Range: r})
		}
		p.Parts[i].touch(n)
	}
	p.Bound(limit)
}

// cut leaves out of a start what is over the bounds.
func cut(start []Range, limit int64) []Range {
	start = start[:min(len(start), MaxParts)]
	for i, r := range start {
		if limit -= r.Len; limit < 0 {
			return start[:i]
		}
	}
	return start
}

// touch notes that the last start read the part as its n-th.
func (k *Part) touch(n int) {
	if k.Seen&1 != 0 {
		return
	}
	before := uint64(bits.OnesCount8(k.Seen))
	k.At = uint32((uint64(k.At)*before + uint64(n)<<8) / (before + 1))
	k.Seen |= 1
}

// Bound forgets what no start in memory has read, and then what fewest did and what
// came last, until the rest is within bounds: MaxParts, and limit bytes.
func (p *Profile) Bound(limit int64) {
	p.Parts = slices.DeleteFunc(p.Parts, func(k Part) bool { return k.Seen == 0 })
	slices.SortFunc(p.Parts, func(a, b Part) int {
		return cmp.Or(cmp.Compare(bits.OnesCount8(b.Seen), bits.OnesCount8(a.Seen)), a.compare(b))
	})
	p.Parts = p.Parts[:min(len(p.Parts), MaxParts)]
	for i, k := range p.Parts {
		if limit -= k.Len; limit < 0 {
			p.Parts = p.Parts[:i]
			break
		}
	}
	slices.SortFunc(p.Parts, Part.compare)
}

// compare orders by the time of the first read.
func (k Part) compare(o Part) int {
	return cmp.Or(cmp.Compare(k.At, o.At), cmp.Compare(k.Segment, o.Segment), cmp.Compare(k.Off, o.Off))
}

// Replay lists what will probably be read, in that order.
func (p *Profile) Replay() []Range {
	runs := min(p.Runs, history)
	var out []Range
	for _, k := range p.Parts {
		if 4*bits.OnesCount8(k.Seen) >= runs {
			out = append(out, k.Range)
		}
	}
	return out
}

// Bytes is the sum of lengths.
func Bytes(ranges []Range) int64 {
	sum := int64(0)
	for _, r := range ranges {
		sum += r.Len
	}
	return sum
}
