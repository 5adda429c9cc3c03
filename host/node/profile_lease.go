package node

import (
	"fmt"

	"github.com/tatami-containers/tatami/host/profile"
	"github.com/tatami-containers/tatami/rootfs/index"
)

// replayGap is how many bytes between two ranges of a profile the node fetches, too,
// rather than ask twice; a guest asks its node, which is near.
const (
	replayGap = 128 << 10
	guestGap  = index.BlockSize - 1 // what lies between two files
)

// maxGuestRanges bounds what a guest is told.
const maxGuestRanges = 4096

// Profile lists what a start of a command will read, in ranges of the image: what
// starts of it did, or those of any command, or else what the publisher of the image's
// index says. Neighbours are joined, no byte of a profile is there twice.
func (l *Lease) Profile(args []string) []index.Range {
	segments := l.Segments()
	ranges := hints(segments)
	if p := l.profile(args); p != nil {
		ranges = placed(segments, profile.Plan(p.Replay(), guestGap))
	}
	return ranges[:min(len(ranges), maxGuestRanges)]
}

// profile is that of a command, or that of all; nil when there is none.
func (l *Lease) profile(args []string) *profile.Profile {
	if key := profile.Key(args); key != "" {
		if p := l.n.loadProfile(l.Manifest(), key); p != nil {
			return p
		}
	}
	return l.n.loadProfile(l.Manifest(), "")
}

// RecordStart merges what a start of a command read first, as ranges of the image in
// their order. Partial is what was read by a container that also read what nobody saw.
func (l *Lease) RecordStart(args []string, ranges []index.Range, partial bool) error {
	limit := profile.MaxBytes(l.Size())
	parts := chunks(l.Segments(), ranges, limit)
	if len(parts) == 0 {
		return nil
	}
	all, err := l.n.changeProfile(l.Manifest(), "", func(p *profile.Profile) {
		p.Source = profile.Recorded
		p.Add(parts, limit, partial)
	})
	if err == nil && len(args) > 0 {
		_, err = l.n.changeProfile(l.Manifest(), profile.Key(args), func(p *profile.Profile) {
			p.Command = profile.Command(args)
			p.Add(parts, limit, partial)
		})
	}
	if err != nil {
		return fmt.Errorf("keep what a start read: %w", err)
	}
	l.n.log.Debug("start recorded", "manifest", l.Manifest(), "chunks", len(parts), "bytes", profile.Bytes(parts), "starts", all.Runs)
	if !partial {
		l.n.publishAfter(l, all)
	}
	return nil
}
