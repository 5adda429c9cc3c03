package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Store bounds what the node keeps of images.
type Store struct {
	// Size is how much of the disk that may take, Mirror.Blobs included: a share of the file system that Root
	// lies on, "75%", or bytes, "200G" as a Size; "0" is no bound but the disk's.
	Size string `toml:"size"`
	// High and Low are when bytes are given up, and until when, in per cent of Size.
	High int `toml:"high"`
	Low  int `toml:"low"`
	// Pinned are references of images whose bytes are never given up, as node.Match
	// has them.
	Pinned []string `toml:"pinned"`
}

// maxPinned bounds the patterns of Pinned.
const maxPinned = 1000

func (s *Store) check() error {
	if _, err := s.Bytes(math.MaxInt64); err != nil {
		return err
	}
	if s.Low < 1 || s.Low > s.High || s.High > 100 {
		return fmt.Errorf("store.low is %d and store.high is %d: give 1 to 100, low not above high", s.Low, s.High)
	}
	if len(s.Pinned) > maxPinned {
		return fmt.Errorf("store.pinned has %d references: give at most %d", len(s.Pinned), maxPinned)
	}
	for _, p := range s.Pinned {
		if p == "" || strings.ContainsAny(p, " \t\n") {
			return fmt.Errorf("store.pinned %q: give references, as registry.k8s.io/pause:*", p)
		}
	}
	return nil
}

// Bytes is Size on a file system of so many bytes.
func (s *Store) Bytes(disk int64) (int64, error) {
	if share, ok := strings.CutSuffix(s.Size, "%"); ok {
		n, err := strconv.Atoi(share)
		if err != nil || n < 1 || n > 100 {
			return 0, fmt.Errorf("store.size %q: give 1%% to 100%%, or bytes as \"200G\"", s.Size)
		}
		return disk / 100 * int64(n), nil
	}
	var n Size
	if err := n.UnmarshalText([]byte(s.Size)); err != nil {
		return 0, fmt.Errorf("store.size: %w, or a share of the disk as \"75%%\"", err)
	}
	return int64(n), nil
}
