package service

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
)

// notesVersion is that of the file's form.
const notesVersion = 1

// maxNotes bounds the file in bytes.
const maxNotes = 64 << 20

// bootFile names the running kernel's boot (random(4)).
const bootFile = "/proc/sys/kernel/random/boot_id"

// notes is what the next process has to know of the sandboxes, kept in a file.
// It counts only until the machine is booted again, as no sandbox outlives
// that; so the file is replaced whole, but not synced.
type notes struct {
	path string // no file when empty
	log  *slog.Logger

	mu  sync.Mutex
	all map[string]note // by sandbox; protected by mu, their containers replaced, never changed
}

// note is one sandbox.
type note struct {
	ID         string          `json:"id"`
	Host       string          `json:"host"`
	Relay      string          `json:"relay"`
	CID        uint32          `json:"cid,omitempty"`
	Found      bool            `json:"found,omitempty"` // not attached by hand
	Containers []containerNote `json:"containers,omitempty"`
}

// containerNote is one container, with the image that its name meant.
type containerNote struct {
	ID        string        `json:"id"`
	Reference string        `json:"reference"`
	Class     string        `json:"class"`
	Reason    string        `json:"reason,omitempty"` // why it is of that class
	Manifest  digest.Digest `json:"manifest"`
	Found     bool          `json:"found,omitempty"` // not added by hand
}

func (n note) place() place {
	return place{host: n.Host, relay: n.Relay, cid: n.CID, found: n.Found}
}

// notesFile is the file's form.
type notesFile struct {
	Version   int    `json:"version"`
	Boot      string `json:"boot"`
	Sandboxes []note `json:"sandboxes"`
}

// openNotes reads the file at path. One that cannot be used is left out with a
// warning.
func openNotes(path string, log *slog.Logger) *notes {
	n := &notes{path: path, log: log, all: map[string]note{}}
	if path == "" {
		return n
	}
	file, err := readNotes(path)
	if errors.Is(err, fs.ErrNotExist) {
		return n // the first start
	}
	if err != nil {
		log.Warn("what was known of sandboxes cannot be read: attach them again", "file", path, "error", err)
	}
	for _, s := range file.Sandboxes {
		n.all[s.ID] = s
	}
	return n
}

func readNotes(path string) (notesFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return notesFile{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxNotes+1))
	if err != nil {
		return notesFile{}, err
	}
	if len(data) > maxNotes {
		return notesFile{}, fmt.Errorf("longer than %d bytes", maxNotes)
	}
	var file notesFile
	if err := json.Unmarshal(data, &file); err != nil {
		return notesFile{}, err
	}
	switch {
	case file.Version != notesVersion:
		return notesFile{}, fmt.Errorf("version %d, this program reads %d", file.Version, notesVersion)
	case file.Boot != bootID():
		return notesFile{}, nil
	}
	return file, nil
}

// bootID is empty where the kernel does not say.
func bootID() string {
	data, err := os.ReadFile(bootFile)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// list returns all sandboxes.
func (n *notes) list() []note {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Values(n.all))
}

// containers returns those of a sandbox that is where it was.
func (n *notes) containers(id string, at place) []containerNote {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s, ok := n.all[id]; ok && s.place() == at {
		return s.Containers
	}
	return nil
}

// put notes a sandbox in place of what was noted of it.
func (n *notes) put(s note) {
	n.change(func() bool {
		n.all[s.ID] = s
		return true
	})
}

// drop forgets sandboxes.
func (n *notes) drop(ids ...string) {
	n.change(func() bool {
		before := len(n.all)
		for _, id := range ids {
			delete(n.all, id)
		}
		return len(n.all) < before
	})
}

// addContainer notes a container of a noted sandbox, in place of what was noted
// of it.
func (n *notes) addContainer(sandbox string, c containerNote) {
	n.change(func() bool {
		s, ok := n.all[sandbox]
		if ok {
			s.Containers = append(without(s.Containers, c.ID), c)
			n.all[sandbox] = s
		}
		return ok
	})
}

// dropContainer forgets a container.
func (n *notes) dropContainer(sandbox, id string) {
	n.change(func() bool {
		s, ok := n.all[sandbox]
		if ok {
			s.Containers = without(s.Containers, id)
			n.all[sandbox] = s
		}
		return ok
	})
}

func without(in []containerNote, id string) []containerNote {
	return slices.DeleteFunc(slices.Clone(in), func(c containerNote) bool { return c.ID == id })
}

// change runs f and writes the file if it says that something is different.
func (n *notes) change(f func() bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !f() || n.path == "" {
		return
	}
	if err := n.write(); err != nil {
		n.log.Warn("what is known of sandboxes cannot be noted; the next process will not know it", "error", err)
	}
}

// write replaces the file. Precondition: n.mu is held.
func (n *notes) write() error {
	file := notesFile{Version: notesVersion, Boot: bootID(), Sandboxes: slices.Collect(maps.Values(n.all))}
	data, err := json.Marshal(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(n.path+".new", n.path)
}
