package snapshotter

import (
	"fmt"
	"maps"
	"strings"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// LabelMode asks for a mode. CRI copies it from a container's annotations, and
// containerd's unpacker from those of a layer, so it counts only where
// Config.Allow has the mode.
const LabelMode = "containerd.io/snapshot/tatami.mode"

// Our own labels. They live in our metadata; clients neither see nor set them.
const (
	ownPrefix      = "dev.tatami.snapshot."
	labelReference = ownPrefix + "reference"
	labelManifest  = ownPrefix + "manifest"
	labelLayers    = ownPrefix + "layers" // "3/7": the lowest 3 of 7
	labelMode      = ownPrefix + "mode"
	labelReason    = ownPrefix + "reason"
	labelHolder    = ownPrefix + "holder"
)

// Bounds of what a client may send. Keys end up as keys of bbolt, which takes
// 32 KiB; containerd's own are "<namespace>/<number>/<name>".
const (
	maxKey    = 4096 // bytes
	maxLabels = 1024
	// Of one snapshot, in bytes. An image's author sets labels, and containerd
	// lists snapshots a hundred to a message, which gRPC bounds to 4 MiB where
	// nothing else is set; a list that fails ends its garbage collection.
	maxLabelBytes = 32 << 10
	maxReason     = 1024 // bytes
)

// record is what we keep of a snapshot beside containerd's metadata.
type record struct {
	// chain is, of a committed snapshot, the layers that it stands for, all of
	// them down to the lowest; of another one the layers that the node gives
	// it. Without a manifest there are none.
	chain  Chain
	mode   Mode   // of a container's snapshot; Full of an unpacked layer
	reason string // why the mode is not the one asked for
	holder string // of what the node gives
}

func (r record) remote() bool { return r.chain.Manifest != "" }

// addTo returns labels with the record's, which replace older ones.
func (r record) addTo(labels map[string]string) map[string]string {
	all := visible(labels)
	if all == nil {
		all = map[string]string{}
	}
	own := map[string]string{
		labelReference: r.chain.Reference, labelManifest: r.chain.Manifest.String(),
		labelMode: string(r.mode), labelReason: r.reason, labelHolder: r.holder,
	}
	if r.remote() {
		own[labelLayers] = fmt.Sprintf("%d/%d", r.chain.Layers, r.chain.Of)
	}
	for k, v := range own {
		if v != "" {
			all[k] = v
		}
	}
	return all
}

// readRecord takes the record out of labels that addTo made.
func readRecord(labels map[string]string) (r record, err error) {
	r = record{
		chain: Chain{Reference: labels[labelReference], Manifest: digest.Digest(labels[labelManifest])},
		mode:  Mode(labels[labelMode]), reason: labels[labelReason], holder: labels[labelHolder],
	}
	if !r.remote() {
		return r, nil
	}
	if err := r.chain.Manifest.Validate(); err != nil {
		return record{}, fmt.Errorf("metadata: manifest %q: %w", r.chain.Manifest, err)
	}
	if _, err := fmt.Sscanf(labels[labelLayers], "%d/%d", &r.chain.Layers, &r.chain.Of); err != nil || r.chain.Layers < 1 || r.chain.Of < r.chain.Layers {
		return record{}, fmt.Errorf("metadata: layers %q: %w", labels[labelLayers], errdefs.ErrDataLoss)
	}
	return r, nil
}

// visible returns the labels that a client sees.
func visible(labels map[string]string) map[string]string {
	out := maps.Clone(labels)
	maps.DeleteFunc(out, func(k, _ string) bool { return strings.HasPrefix(k, ownPrefix) })
	return out
}

// visibleInfo hides our labels.
func visibleInfo(info snapshots.Info) snapshots.Info {
	info.Labels = visible(info.Labels)
	return info
}

// infoOf returns what the options of a call say, after looking at it.
func infoOf(opts []snapshots.Opt) (snapshots.Info, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return info, err
		}
	}
	return info, checkLabels(info.Labels)
}

func checkLabels(all map[string]string) error {
	if len(all) > maxLabels {
		return fmt.Errorf("%d labels, more than %d: %w", len(all), maxLabels, errdefs.ErrInvalidArgument)
	}
	size := 0
	for k, v := range all {
		size += len(k) + len(v)
		if err := labels.Validate(k, v); err != nil {
			return err
		}
		if k == "" || strings.HasPrefix(k, ownPrefix) {
			return fmt.Errorf("label %q belongs to the snapshotter: %w", k, errdefs.ErrInvalidArgument)
		}
	}
	if size > maxLabelBytes {
		return fmt.Errorf("labels of %d bytes, more than %d: %w", size, maxLabelBytes, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkKey looks at the key or name of a snapshot; what says which.
func checkKey(what, key string) error {
	switch {
	case key == "":
		return fmt.Errorf("%s is empty: %w", what, errdefs.ErrInvalidArgument)
	case len(key) > maxKey || strings.ContainsRune(key, 0) || !utf8.ValidString(key):
		return fmt.Errorf("%s %.64q has %d bytes, more than %d, or is not a text: %w", what, key, len(key), maxKey, errdefs.ErrInvalidArgument)
	}
	return nil
}

// reasonOf shortens an error to what is kept of it.
func reasonOf(err error) string {
	s := strings.ToValidUTF8(err.Error(), "?")
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "…"
	}
	return s
}
