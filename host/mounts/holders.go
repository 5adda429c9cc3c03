package mounts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/snapshotter"
)

// holding is what a holder has, and the content of its record.
type holding struct {
	Version int   `json:"version"`
	Use     use   `json:"use"`
	Chain   chain `json:"chain"`
}

// chain is a snapshotter.Chain on disk.
type chain struct {
	Reference string        `json:"reference"`
	Manifest  digest.Digest `json:"manifest"`
	Layers    int           `json:"layers"`
	Of        int           `json:"of"`
}

const holdingVersion = 1

func (h holding) chain() snapshotter.Chain { return snapshotter.Chain(h.Chain) }

// key names what is held, for locks.
func (h holding) key() string { return string(h.Use) + " " + imageOf(h.chain()).String() }

func (m *Mounts) holdersDir() string { return filepath.Join(m.cfg.Dir, "holders") }

// maxHolder bounds a holder's name in bytes.
const maxHolder = 200

func (m *Mounts) path(holder string) (string, error) {
	plain := func(r rune) bool {
		return r < 0x80 && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r))
	}
	if holder == "" || len(holder) > maxHolder || holder[0] == '.' || strings.ContainsFunc(holder, func(r rune) bool { return !plain(r) }) {
		return "", fmt.Errorf("holder %.64q is not a plain word: %w", holder, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(m.holdersDir(), holder+".json"), nil
}

// add writes the record of a holder, unless it is there.
func (m *Mounts) add(holder string, h holding) (added bool, err error) {
	path, err := m.path(holder)
	if err != nil {
		return false, err
	}
	h.Version = holdingVersion
	m.mu.Lock()
	defer m.mu.Unlock()
	if old, ok := m.holders[holder]; ok {
		if old != h {
			return false, fmt.Errorf("%s holds %s (%s) already: %w", holder, old.Chain.Reference, old.Use, errdefs.ErrFailedPrecondition)
		}
		return false, nil
	}
	data, err := json.Marshal(h)
	if err == nil {
		err = os.WriteFile(path+".tmp", data, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".tmp", path)
	}
	if err != nil {
		return false, fmt.Errorf("write record of holder %s: %w", holder, err)
	}
	m.holders[holder] = h
	return true, nil
}

// drop removes the record of a holder.
func (m *Mounts) drop(holder string) error {
	path, err := m.path(holder)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove record of holder %s: %w", holder, err)
	}
	delete(m.holders, holder)
	return nil
}

// held says whether anybody holds the same thing.
func (m *Mounts) held(h holding) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, other := range m.holders {
		if other.key() == h.key() {
			return true
		}
	}
	return false
}

// load reads the records. One that cannot be read is removed: its holder asks
// again when it needs something.
func (m *Mounts) load() error {
	files, err := os.ReadDir(m.holdersDir())
	if err != nil {
		return fmt.Errorf("read records of holders: %w", err)
	}
	for _, f := range files {
		path := filepath.Join(m.holdersDir(), f.Name())
		h, err := readHolding(path)
		if err != nil {
			m.log.Warn("a holder's record cannot be read and is removed", "path", path, "error", err)
			if err := os.Remove(path); err != nil {
				return err
			}
			continue
		}
		m.holders[strings.TrimSuffix(f.Name(), ".json")] = h
	}
	return nil
}

func readHolding(path string) (holding, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return holding{}, err
	}
	var h holding
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		return holding{}, err
	}
	c := h.Chain
	if h.Version != holdingVersion || h.Use != tree && h.Use != file || c.Manifest.Validate() != nil || c.Layers < 1 || c.Layers > c.Of || !strings.HasSuffix(path, ".json") {
		return holding{}, fmt.Errorf("it describes nothing that can be held: %w", errdefs.ErrDataLoss)
	}
	return h, nil
}

// Holders implements snapshotter.Images.
func (m *Mounts) Holders(context.Context) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.holders)), nil
}
