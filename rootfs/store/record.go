package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// record is what the store remembers of an image on disk, beside its bootstrap
// and the tables of its segments.
type record struct {
	Version   int             `json:"version"`
	Manifest  digest.Digest   `json:"manifest"`
	Bootstrap digest.Digest   `json:"bootstrap"` // of the .boot file
	BootSize  int64           `json:"bootSize"`  // bytes
	Segments  []recordSegment `json:"segments"`
}

type recordSegment struct {
	ID    index.ID      `json:"id"`
	Layer digest.Digest `json:"layer"`
	Size  int64         `json:"size"` // bytes

	// Prefetch are the hints of index.Segment. They do not change what an image is.
	Prefetch []index.Range `json:"prefetch,omitempty"`
}

const recordVersion = 2 // 1 had no hints

func newRecord(img *index.Image) record {
	r := record{
		Version: recordVersion, Manifest: img.Manifest,
		Bootstrap: digest.FromBytes(img.Bootstrap), BootSize: int64(len(img.Bootstrap)),
	}
	for i := range img.Segments {
		g := &img.Segments[i]
		r.Segments = append(r.Segments, recordSegment{ID: g.ID, Layer: g.Layer, Size: g.Table.Size, Prefetch: g.Prefetch})
	}
	return r
}

// equal says whether two records are of the same bytes.
func (r *record) equal(o *record) bool {
	return r.Manifest == o.Manifest && r.Bootstrap == o.Bootstrap &&
		slices.EqualFunc(r.Segments, o.Segments, func(a, b recordSegment) bool {
			return a.ID == b.ID && a.Layer == b.Layer && a.Size == b.Size
		})
}

// sameHints says whether two equal records have the same hints.
func (r *record) sameHints(o *record) bool {
	return slices.EqualFunc(r.Segments, o.Segments, func(a, b recordSegment) bool { return slices.Equal(a.Prefetch, b.Prefetch) })
}

// size is the image's length in bytes.
func (r *record) size() int64 {
	n := r.BootSize
	for _, g := range r.Segments {
		n += g.Size
	}
	return n
}

// offset is where segment id starts in the image.
func (r *record) offset(id index.ID) (int64, bool) {
	off := r.BootSize
	for _, g := range r.Segments {
		if g.ID == id {
			return off, true
		}
		off += g.Size
	}
	return 0, false
}

func encodeRecord(r *record) ([]byte, error) { return json.MarshalIndent(r, "", "\t") }

// decodeRecord decodes and checks a record file.
func decodeRecord(data []byte) (record, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("decode image record: %w", errors.Join(errdefs.ErrDataLoss, err))
	}
	if err := r.check(); err != nil {
		return r, fmt.Errorf("decode image record: %w", errors.Join(errdefs.ErrDataLoss, err))
	}
	return r, nil
}

func (r *record) check() error {
	if r.Version != recordVersion {
		return fmt.Errorf("unknown version %d", r.Version)
	}
	if r.BootSize <= 0 || r.BootSize > index.MaxBootstrap || r.BootSize%index.BlockSize != 0 {
		return fmt.Errorf("bootstrap of %d bytes", r.BootSize)
	}
	if len(r.Segments) > index.MaxSegments {
		return fmt.Errorf("%d segments are over %d", len(r.Segments), index.MaxSegments)
	}
	err := errors.Join(r.Manifest.Validate(), r.Bootstrap.Validate())
	seen := map[index.ID]bool{}
	for _, g := range r.Segments {
		if g.Size <= 0 || g.Size > index.MaxSegment || g.Size%index.BlockSize != 0 || seen[g.ID] {
			err = errors.Join(err, fmt.Errorf("segment %.80q of %d bytes", g.ID, g.Size))
		}
		seen[g.ID] = true
		err = errors.Join(err, g.ID.Validate(), g.Layer.Validate(), g.checkHints())
	}
	return err
}

func (g *recordSegment) checkHints() error {
	for _, r := range g.Prefetch {
		if r.Off < 0 || r.Len < 1 || r.Off > g.Size-r.Len {
			return fmt.Errorf("hint of %d bytes at %d in segment %.80q of %d bytes", r.Len, r.Off, g.ID, g.Size)
		}
	}
	return nil
}

// loadRecords reads the records of all images and removes the remains of images
// that have none.
func (s *Store) loadRecords() error {
	found, err := stems(s.dir.images())
	if err != nil {
		return err
	}
	for stem, suffixes := range found {
		r, err := s.loadRecord(stem)
		switch {
		case err == nil:
			s.records[r.Manifest] = r
			continue
		case errors.Is(err, errdefs.ErrDataLoss):
			s.log.Warn("image record is damaged; the image has to be opened from its index again", "image", stem, "err", err)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		for _, suffix := range suffixes {
			if err := os.Remove(filepath.Join(s.dir.images(), stem+suffix)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) loadRecord(stem string) (record, error) {
	data, err := os.ReadFile(filepath.Join(s.dir.images(), stem+recordFile))
	if err != nil {
		return record{}, err
	}
	r, err := decodeRecord(data)
	if err == nil && r.Manifest.Encoded() != stem {
		err = fmt.Errorf("it is of %s: %w", r.Manifest, errdefs.ErrDataLoss)
	}
	return r, err
}
