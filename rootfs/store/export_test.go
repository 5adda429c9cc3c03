package store

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store/replace"
)

// SetFillPatience changes how long Fill waits for demand reads.
func (s *Store) SetFillPatience(d time.Duration) { s.fillPatience = d }

// Waiting is how many demand reads wait for chunks.
func (s *Store) Waiting() int64 { return s.demand.waiting.Load() }

// Flush makes durable what was kept so far.
func (s *Store) Flush() { s.flushAll() }

// ForgetMemory drops the chunks that wait in memory.
func (s *Store) ForgetMemory() { s.mem.drop() }

// SetSync changes how the data of segments is synced.
func (s *Store) SetSync(f func(*os.File) error) { s.syncFile = f }

// Ahead is how many bytes of readahead are in flight.
func (s *Store) Ahead() int64 { return s.stats.ahead.Load() }

// Scanned waits until the chunks on disk are known.
func (s *Store) Scanned() { <-s.scanned }

// Known is how many chunks are known.
func (s *Store) Known() int {
	s.known.mu.Lock()
	defer s.known.mu.Unlock()
	return len(s.known.places)
}

// OpenExtents is Open with extents of another length in bytes.
func OpenExtents(cfg Config, extent int64) (*Store, error) { return open(cfg, extent, (*os.File).Sync) }

// Surveyed waits until what takes the disk is known.
func (s *Store) Surveyed() { <-s.surveyed }

// Look has the store look whether bytes have to go, and reports when that is done.
func (s *Store) Look() <-chan struct{} {
	round := s.room.next()
	s.wakeRoom()
	return round
}

// Settled says whether nothing is to be given up: there is no need or nothing may go.
func (s *Store) Settled() bool { return s.excess() == 0 || s.room.none(!s.room.wanted.Load()) }

// Stuck says whether nothing may be given up.
func (s *Store) Stuck() bool { return s.room.stuck.Load() }

// Press is as if the disk were full.
func (s *Store) Press() { s.full(unix.ENOSPC, false) }

// Extents is how many extents are known.
func (s *Store) Extents() (n int) {
	s.usage.mu.Lock()
	defer s.usage.mu.Unlock()
	for _, g := range s.usage.segments {
		n += len(g.extents)
	}
	return n
}

// Simulate makes the files of a store with images of so many segments, each of size
// bytes that all are there as far as the files say. Their tables are no tables: who
// reads one fails.
func Simulate(dir string, images, segments int, size int64) error {
	l := layout(dir)
	if err := l.make(); err != nil {
		return err
	}
	extents := make([]replace.Extent, size/extentSize)
	for i := range extents {
		extents[i] = replace.Extent{Bytes: extentSize, Last: uint32(i + 1), Level: replace.Protected}
	}
	use := encodeUse(extents, extentSize)
	for n := range images {
		name := fmt.Sprint("image ", n)
		r := record{Version: recordVersion, Manifest: digest.FromString(name), Bootstrap: digest.FromString(name), BootSize: index.BlockSize}
		for k := range segments {
			id := digest.FromString(fmt.Sprint(n, ":", k))
			r.Segments = append(r.Segments, recordSegment{ID: id, Layer: id, Size: size})
			err := errors.Join(os.WriteFile(l.segment(id, dataFile), nil, 0o600), os.Truncate(l.segment(id, dataFile), size),
				os.WriteFile(l.segment(id, tableFile), []byte("no table"), 0o600), os.WriteFile(l.segment(id, useFile), use, 0o600))
			if err != nil {
				return err
			}
		}
		data, err := encodeRecord(&r)
		if err == nil {
			err = os.WriteFile(l.image(r.Manifest, recordFile), data, 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// OpenSyncing is OpenExtents with another way to sync the data of segments.
func OpenSyncing(cfg Config, extent int64, sync func(*Store, *os.File) error) (s *Store, err error) {
	opened := make(chan struct{})
	defer close(opened)
	return open(cfg, extent, func(f *os.File) error {
		<-opened
		return sync(s, f)
	})
}

// Idle fails when anything is fetched, claimed, held or waited for.
func (s *Store) Idle() error {
	s.mem.mu.Lock()
	defer s.mem.mu.Unlock()
	if n := len(s.mem.line.waiting); n > 0 || s.mem.line.held != [levels]int64{} {
		return fmt.Errorf("%d wait for memory, held: %v", n, s.mem.line.held)
	}
	if n := s.stats.fetches.Load(); n != 0 {
		return fmt.Errorf("%d fetches", n)
	}
	if n := s.stats.ahead.Load(); n != 0 {
		return fmt.Errorf("%d bytes read ahead", n)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, g := range s.segments {
		g.mu.Lock()
		n := len(g.claims)
		g.mu.Unlock()
		if n > 0 {
			return fmt.Errorf("%d claims of segment %s", n, id)
		}
	}
	return nil
}

// HurryAfter is how long a reader waits for a request that was made for who can wait.
const HurryAfter = hurryAfter
