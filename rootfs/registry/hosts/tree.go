package hosts

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

const (
	// checkEvery is how often a tree is looked at, at most.
	checkEvery = time.Second
	// maxText bounds hosts.toml in bytes. The parser takes a time that grows with
	// the square of some texts, and requests wait for it.
	maxText = 64 << 10
	// maxFile bounds certificate files in bytes.
	maxFile = 1 << 20
	// maxRegistries bounds the cache; a full one starts again empty.
	maxRegistries = 1024
)

// Options say what a Tree does not find in its files. The zero value works.
type Options struct {
	// PlainHTTP tells whether the registry itself ("host:port") speaks HTTP
	// without TLS. Nil is registry.Loopback.
	PlainHTTP func(host string) bool
	Log       *slog.Logger // nil logs nothing
}

// Tree is the hosts of registries as directories of hosts.toml files have them.
// Its methods may be called at any time.
type Tree struct {
	roots []string
	opts  Options

	mu    sync.Mutex
	known map[string]*entry // by registry; protected by mu
}

// entry is what is known of one registry.
type entry struct {
	checked time.Time
	stamp   [sha256.Size]byte // of all that was read
	hosts   []*registry.Host  // last good ones
}

// New returns the tree below roots, of which each may be absent.
func New(roots []string, opts Options) *Tree {
	if opts.PlainHTTP == nil {
		opts.PlainHTTP = registry.Loopback
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Tree{roots: roots, opts: opts, known: map[string]*entry{}}
}

// Hosts is for registry.Config.Hosts. It reads files anew at most once in
// checkEvery; as long as these hold the same, it returns the same hosts.
func (t *Tree) Hosts(name string) []*registry.Host {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.known[name]
	if e == nil {
		if len(t.known) >= maxRegistries {
			clear(t.known)
		}
		e = &entry{}
		t.known[name] = e
	}
	if now := time.Now(); now.Sub(e.checked) >= checkEvery {
		e.checked = now
		t.refresh(name, e)
	}
	return e.hosts
}

// refresh reads the files of a registry. Without a change of their content it
// changes nothing; a mistake in them keeps what was.
func (t *Tree) refresh(name string, e *entry) {
	dir, err := t.dir(name)
	r := &reader{dir: dir, sum: sha256.New()}
	var hosts []*registry.Host
	if err == nil && dir != "" {
		hosts, err = t.load(name, r)
	}
	_, _ = fmt.Fprintf(r.sum, "%s %v", dir, err) // never fails
	stamp := [sha256.Size]byte(r.sum.Sum(nil))
	if stamp == e.stamp {
		return
	}
	first := e.stamp == [sha256.Size]byte{}
	e.stamp = stamp
	log := t.opts.Log.With("registry", name, "directory", dir)
	if len(r.unknown) > 0 {
		log.Warn("hosts.toml has keys that are not known; they are ignored", "keys", r.unknown)
	}
	switch {
	case err != nil && first:
		log.Error("hosts.toml cannot be used: the registry is asked itself", "error", err)
	case err != nil:
		log.Error("hosts.toml cannot be used: the last good one stays in force", "error", err)
	default:
		e.hosts = hosts
		if len(hosts) > 0 || !first {
			log.Info("hosts of a registry are read", "hosts", names(hosts))
		}
	}
}

func names(hosts []*registry.Host) []string {
	list := make([]string, 0, len(hosts))
	for _, h := range hosts {
		list = append(list, h.Scheme+"://"+h.Name+h.Path)
	}
	return list
}

// dir finds the directory of a registry; "" is none.
func (t *Tree) dir(name string) (string, error) {
	candidates := []string{name, "_default"}
	if host, port, err := net.SplitHostPort(name); err == nil {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		candidates = []string{host + "_" + port + "_", name, "_default"}
	}
	for _, root := range t.roots {
		for _, c := range candidates {
			if c == "." || !filepath.IsLocal(c) {
				continue // no domain is such a name
			}
			path := filepath.Join(root, c)
			if _, err := os.Stat(path); err == nil {
				return path, nil
			} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
				return "", err
			}
		}
	}
	return "", nil
}

// load reads the directory of a registry.
func (t *Tree) load(name string, r *reader) ([]*registry.Host, error) {
	text, err := r.readUpTo("hosts.toml", maxText)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f := &file{}
	if len(text) == 0 {
		f.settings, err = dockerCertificates(r.dir)
	} else {
		f, err = parse(text)
	}
	if err != nil {
		return nil, err
	}
	r.unknown = f.unknown
	var list []*registry.Host
	for _, address := range f.order {
		h, err := f.Hosts[address].host(address, r.read)
		if err != nil {
			return nil, err
		}
		list = append(list, h)
	}
	last, err := t.server(name, f, r.read)
	if err != nil {
		return nil, err
	}
	if f.settings.empty() {
		return withServer(list, last), nil
	}
	return append(list, last), nil
}

// withServer adds the host that is asked last and has no settings. Many write what
// the registry itself needs, its authority above all, in a [host] of the same URL:
// then that is meant, and asked with the patience that a mirror does not get.
func withServer(list []*registry.Host, last *registry.Host) []*registry.Host {
	for i, h := range list {
		if h.Scheme != last.Scheme || h.Name != last.Name || h.Path != last.Path {
			continue
		}
		if h.Capabilities == registry.CanAll && i == len(list)-1 {
			return list
		}
		same := *h
		same.Capabilities = registry.CanAll
		return append(list, &same)
	}
	return append(list, last)
}

// server returns the host that is asked last.
func (t *Tree) server(name string, f *file, read readFile) (*registry.Host, error) {
	if f.Server != "" {
		return f.settings.host(f.Server, read)
	}
	h := &registry.Host{Name: name, Scheme: "https", Path: "/v2"}
	if name == "docker.io" {
		h.Name = "registry-1.docker.io"
	} else if t.opts.PlainHTTP(name) {
		h.Scheme = "http"
	}
	if err := f.settings.apply(h, read); err != nil {
		return nil, err
	}
	h.Capabilities = registry.CanAll
	return h, nil
}

// dockerCertificates finds Docker's files: authorities in *.crt, certificates of
// the client in *.cert with the key in *.key, or with both in the former.
func dockerCertificates(dir string) (settings, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return settings{}, err
	}
	var cas, clients []any
	for _, e := range entries {
		name := e.Name()
		switch {
		case e.IsDir():
		case strings.HasSuffix(name, ".crt"):
			cas = append(cas, name)
		case strings.HasSuffix(name, ".cert"):
			key := strings.TrimSuffix(name, ".cert") + ".key"
			if _, err := os.Stat(filepath.Join(dir, key)); err != nil {
				key = ""
			}
			clients = append(clients, []any{name, key})
		}
	}
	return settings{CA: cas, Client: clients}, nil
}

// reader reads the files of one directory and remembers in sum what they held.
type reader struct {
	dir     string
	sum     hash.Hash
	unknown []string
}

func (r *reader) read(name string) ([]byte, error) { return r.readUpTo(name, maxFile) }

func (r *reader) readUpTo(name string, limit int64) ([]byte, error) {
	path := name
	if !filepath.IsAbs(path) {
		path = filepath.Join(r.dir, name)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("read %s: longer than %d bytes", path, limit)
	}
	_, _ = fmt.Fprintf(r.sum, "%q %d ", path, len(data)) // never fails
	_, _ = r.sum.Write(data)                             // never fails
	return data, nil
}
