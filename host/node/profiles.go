package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/profile"
	"github.com/tatami-containers/tatami/rootfs/index"
)

// Profiles says what is done with start-up profiles.
type Profiles struct {
	Record time.Duration // how long a start is recorded; 0: not at all
	Push   bool          // profiles of enough starts are published
}

// Profiles are in the directory of their image, and go with it.
const (
	profilePrefix = "profile-"
	profileSuffix = ".json"
	profileAll    = "all" // in the place of the key
	// maxProfiles bounds the commands of one image that have a profile.
	maxProfiles = 16
)

func (n *Node) profilePath(d digest.Digest, key string) string {
	return filepath.Join(n.files.image(d), profilePrefix+cmp.Or(key, profileAll)+profileSuffix)
}

func (n *Node) hasProfile(d digest.Digest, key string) bool {
	_, err := os.Stat(n.profilePath(d, key))
	return err == nil
}

// loadProfile reads a profile; nil when there is none, or a damaged one.
func (n *Node) loadProfile(d digest.Digest, key string) *profile.Profile {
	data, err := readBounded(n.profilePath(d, key), profile.MaxEncoded)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var p *profile.Profile
	if err == nil {
		p, err = profile.Decode(data)
	}
	if err == nil && p.Entrypoint != key {
		err = fmt.Errorf("it is of entrypoint %q: %w", p.Entrypoint, errdefs.ErrDataLoss)
	}
	if err != nil {
		n.log.Warn("a start-up profile cannot be read and is not used", "manifest", d, "entrypoint", key, "error", err)
		return nil
	}
	return p
}

// changeProfile changes a profile, or a new one, and keeps it. ErrNotFound when the
// image is gone.
func (n *Node) changeProfile(d digest.Digest, key string, change func(*profile.Profile)) (*profile.Profile, error) {
	n.profiling.Lock()
	defer n.profiling.Unlock()
	if !n.Has(d) {
		return nil, fmt.Errorf("profile of image %s: it is not on the node: %w", d, errdefs.ErrNotFound)
	}
	p := n.loadProfile(d, key)
	if p == nil {
		n.makeRoom(d)
		p = &profile.Profile{Entrypoint: key, Source: profile.Recorded}
	}
	change(p)
	data, err := profile.Encode(p)
	if err == nil {
		err = n.files.write(n.profilePath(d, key), data)
	}
	if err != nil {
		return nil, fmt.Errorf("keep the profile of image %s: %w", d, err)
	}
	return p, nil
}

// profileKeys lists the commands of an image that have a profile, by their keys.
func (n *Node) profileKeys(d digest.Digest) []string {
	entries, err := os.ReadDir(n.files.image(d))
	if err != nil {
		return nil // it is gone
	}
	var keys []string
	for _, e := range entries {
		key, mine := strings.CutPrefix(e.Name(), profilePrefix)
		key, named := strings.CutSuffix(key, profileSuffix)
		if !mine || !named {
			continue
		}
		if key == profileAll {
			key = ""
		}
		keys = append(keys, key)
	}
	return keys
}

// makeRoom forgets what commands of an image were recorded longest ago, so that there
// is room for one more. Precondition: profiling is held.
func (n *Node) makeRoom(d digest.Digest) {
	keys := slices.DeleteFunc(n.profileKeys(d), func(k string) bool { return k == "" })
	age := func(k string) time.Time {
		st, err := os.Stat(n.profilePath(d, k))
		if err != nil {
			return time.Time{}
		}
		return st.ModTime()
	}
	slices.SortFunc(keys, func(a, b string) int { return age(a).Compare(age(b)) })
	for _, k := range keys[:max(len(keys)-maxProfiles+1, 0)] {
		n.dropProfile(d, k)
	}
}

func (n *Node) dropProfile(d digest.Digest, key string) {
	if err := os.Remove(n.profilePath(d, key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.Warn("a start-up profile cannot be removed", "manifest", d, "entrypoint", key, "error", err)
	}
}

// RemoveProfiles forgets the profiles of an image; none is fine.
func (n *Node) RemoveProfiles(d digest.Digest) {
	n.profiling.Lock()
	defer n.profiling.Unlock()
	for _, k := range n.profileKeys(d) {
		n.dropProfile(d, k)
	}
}

// ImageProfile is a profile and the image that it is of.
type ImageProfile struct {
	Manifest  digest.Digest
	Reference string // one that means the image; "" when none does
	*profile.Profile
}

// Profiles lists all profiles, by image and command.
func (n *Node) Profiles() []ImageProfile {
	n.mu.Lock()
	var images []digest.Digest
	for d := range n.images {
		images = append(images, d)
	}
	n.mu.Unlock()
	slices.Sort(images)
	names := n.references()
	var out []ImageProfile
	for _, d := range images {
		keys := n.profileKeys(d)
		slices.Sort(keys)
		for _, k := range slices.Compact(keys) {
			if p := n.loadProfile(d, k); p != nil {
				out = append(out, ImageProfile{d, names[d], p})
			}
		}
	}
	return out
}

// references has for each image the first reference that means it.
func (n *Node) references() map[digest.Digest]string {
	out := map[digest.Digest]string{}
	entries, err := os.ReadDir(n.files.refs())
	if err != nil {
		return out // only names are missing then
	}
	for _, e := range entries {
		m, err := readMeaning(filepath.Join(n.files.refs(), e.Name()))
		if err != nil {
			continue // as meant finds it
		}
		if old := out[m.Manifest]; old == "" || m.Reference < old {
			out[m.Manifest] = m.Reference
		}
	}
	return out
}

// Named finds an image by its manifest's digest or by a reference that was prepared for
// the node's own platform. ErrNotFound when the node does not have it.
func (n *Node) Named(name string) (digest.Digest, error) {
	if d, err := digest.Parse(name); err == nil {
		if n.Has(d) {
			return d, nil
		}
		return "", fmt.Errorf("image %s is not on the node: prepare it first: %w", d, errdefs.ErrNotFound)
	}
	named, _, err := parseTarget(name, "")
	if err != nil {
		return "", err
	}
	m := n.meant(target{reference: named.String()})
	if m == nil {
		return "", fmt.Errorf("image %s is not on the node: prepare it first: %w", named, errdefs.ErrNotFound)
	}
	return m.Manifest, nil
}

// maxLooked bounds the chunks that are looked at for one profile: a guest may say all of
// its image again and again.
const maxLooked = 4 * profile.MaxParts

// chunks lists the chunks that ranges of an image touch, in the order of the ranges,
// none twice, as far as a profile has room.
func chunks(segments []index.Segment, ranges []index.Range, limit int64) []profile.Range {
	var out []profile.Range
	seen, looked := map[profile.Range]bool{}, 0
	for _, r := range ranges {
		end := r.Off + min(r.Len, 1<<62-r.Off) // of whatever a guest says
		if r.Off < 0 || r.Len < 0 || r.Off >= 1<<62 {
			continue
		}
		for k := sort.Search(len(segments), func(k int) bool { return segments[k].End() > r.Off }); k < len(segments) && segments[k].Off < end; k++ {
			s := &segments[k]
			for _, c := range spanned(s.Table, r.Off-s.Off, end-s.Off) {
				part := profile.Range{Segment: s.ID, Off: c.Off, Len: c.Len}
				if looked++; looked > maxLooked {
					return out
				}
				if seen[part] {
					continue
				}
				if limit -= c.Len; limit < 0 || len(out) == profile.MaxParts {
					return out
				}
				seen[part], out = true, append(out, part)
			}
		}
	}
	return out
}

// spanned are the chunks that [off, end) of a segment touches.
func spanned(t *index.Table, off, end int64) []index.Chunk {
	from := sort.Search(len(t.Chunks), func(i int) bool { return t.Chunks[i].End() > off })
	to := from + sort.Search(len(t.Chunks)-from, func(i int) bool { return t.Chunks[from+i].Off >= end })
	return t.Chunks[from:to]
}

// placed turns ranges of segments into ranges of the image. Those of segments that the
// image does not have are of another layout of its layers, and are left out.
func placed(segments []index.Segment, ranges []profile.Range) []index.Range {
	at := make(map[index.ID]*index.Segment, len(segments))
	for k := range segments {
		at[segments[k].ID] = &segments[k]
	}
	var out []index.Range
	for _, r := range ranges {
		s := at[r.Segment]
		if s == nil || r.Off < 0 || r.Off >= s.Table.Size || r.Len < 1 {
			continue
		}
		out = append(out, index.Range{Off: s.Off + r.Off, Len: min(r.Len, s.Table.Size-r.Off)})
	}
	return out
}
