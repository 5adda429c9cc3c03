package criproxy

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"github.com/distribution/reference"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

const (
	// maxRepositories bounds what is remembered: the repository that was pulled
	// longest ago goes first.
	maxRepositories = 1024
	// maxEach bounds the credentials of one repository: pods with different secrets.
	maxEach = 8
	// maxKey bounds one credential in bytes. Tokens of clouds have some thousand.
	maxKey = 32 << 10
	// maxBytes bounds all of them.
	maxBytes = 4 << 20
)

// Keys remembers credentials of pulls, by repository. It is a source of
// credentials for the registry's client.
type Keys struct {
	log    *slog.Logger
	memory *Memory // nil: they end with the process
	tried  credentials.Candidates

	mu    sync.Mutex
	known map[string]*entry // by repository; protected by mu, as the entries are
	clock uint64            // of entry.used; protected by mu
}

// entry is what is known of one repository.
type entry struct {
	keys  []*key // the last one that was passed first
	used  uint64 // when a pull last began or ended
	pulls int    // under way
}

// size is what the credentials take in bytes.
func (e *entry) size() (n int) {
	for _, key := range e.keys {
		n += key.size()
	}
	return n
}

// key is a credential that came with a pull.
type key struct {
	server string // the only host ("host:port") that it is for; "" is any
	cred   auth.Credential
	pulls  int  // under way with it
	good   bool // a pull with it went well
}

func (k *key) size() int {
	return len(k.server) + len(k.cred.Username) + len(k.cred.Password) + len(k.cred.RefreshToken) + len(k.cred.AccessToken)
}

func (k *key) same(o *key) bool { return k.server == o.server && k.cred == o.cred }

// NewKeys returns what memory holds; nil is no memory.
func NewKeys(memory *Memory, log *slog.Logger) *Keys {
	k := &Keys{log: log, memory: memory, known: map[string]*entry{}}
	for _, s := range memory.load() {
		e := k.known[s.Repository]
		if e == nil {
			e = &entry{used: k.tick()}
			k.known[s.Repository] = e
		}
		e.keys = append(e.keys, &key{server: s.Server, cred: s.Credential, good: true})
	}
	return k
}

var _ credentials.Source = (*Keys)(nil)

// Credential implements credentials.Source: what came with a pull of this very
// repository.
func (k *Keys) Credential(ctx context.Context, host string) (auth.Credential, error) {
	repository := registry.LookupOf(ctx).Repository
	list := k.list(repository, host)
	if len(list) == 0 {
		return auth.EmptyCredential, nil
	}
	return k.tried.Choose(ctx, repository, list), nil
}

func (k *Keys) list(repository, host string) (list []auth.Credential) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.known[repository]
	if e == nil {
		return nil
	}
	for _, key := range e.keys {
		if key.server == "" || key.server == host {
			list = append(list, key.cred)
		}
	}
	return list
}

// begin notes a pull; end says how it ended. A pull reads its image before it ends,
// so its credential counts at once. If it fails, and no other pull went well with
// the credential, that is forgotten.
func (k *Keys) begin(repository string, with *key) (end func(error)) {
	if with.size() > maxKey {
		k.log.Warn("a pull came with a credential that is too long to be remembered", "repository", repository, "limit", maxKey)
		return func(error) {}
	}
	k.tried.Trust(repository, with.cred)
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.known[repository]
	if e == nil {
		e = &entry{}
		k.known[repository] = e
	}
	i := slices.IndexFunc(e.keys, with.same)
	if i >= 0 {
		with = e.keys[i]
		e.keys = slices.Delete(e.keys, i, i+1)
	}
	e.keys = slices.Insert(e.keys, 0, with)
	with.pulls++
	e.pulls++
	e.used = k.tick()
	k.bound(e)
	return func(err error) { k.end(repository, e, with, err) }
}

func (k *Keys) end(repository string, e *entry, with *key, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	with.pulls--
	e.pulls--
	e.used = k.tick()
	if err == nil {
		with.good = true
	}
	if !with.good && with.pulls == 0 {
		e.keys = slices.DeleteFunc(e.keys, with.same)
	}
	if len(e.keys) == 0 && e.pulls == 0 {
		delete(k.known, repository)
	}
	if err == nil {
		k.save()
	}
}

// tick returns the next moment.
// Precondition: k.mu is held, or nobody else has k.
func (k *Keys) tick() uint64 {
	k.clock++
	return k.clock
}

// bound forgets what is too much. Pulls under way keep theirs.
// Precondition: k.mu is held, and e is what has grown.
func (k *Keys) bound(e *entry) {
	for i := len(e.keys) - 1; i >= maxEach; i-- {
		if e.keys[i].pulls == 0 {
			e.keys = slices.Delete(e.keys, i, i+1)
		}
	}
	total := 0
	for _, e := range k.known {
		total += e.size()
	}
	if len(k.known) <= maxRepositories && total <= maxBytes {
		return
	}
	// An eighth more than must go, so that this is rare.
	names := k.byUse()
	for i := len(names) - 1; i >= 0 && (len(k.known) > maxRepositories*7/8 || total > maxBytes*7/8); i-- {
		if e := k.known[names[i]]; e.pulls == 0 {
			total -= e.size()
			delete(k.known, names[i])
		}
	}
}

// byUse lists repositories, the one that was used last first.
// Precondition: k.mu is held.
func (k *Keys) byUse() []string {
	names := make([]string, 0, len(k.known))
	for name := range k.known {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Compare(k.known[b].used, k.known[a].used) })
	return names
}

// now is a moment for retain; ok is false when nothing is remembered.
func (k *Keys) now() (at uint64, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tick(), len(k.known) > 0
}

// retain forgets the repositories of which containerd has no image: present is what
// it had at a moment or later. What was pulled since then stays.
func (k *Keys) retain(present map[string]bool, at uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	before := len(k.known)
	for name, e := range k.known {
		if !present[name] && e.pulls == 0 && e.used < at {
			delete(k.known, name)
		}
	}
	if len(k.known) < before {
		k.save()
	}
}

// save writes what is known to be good to memory, the last used first.
// Precondition: k.mu is held.
func (k *Keys) save() {
	if k.memory == nil {
		return
	}
	var all []saved
	for _, name := range k.byUse() {
		for _, key := range k.known[name].keys {
			if key.good {
				all = append(all, saved{Repository: name, Server: key.server, Credential: key.cred})
			}
		}
	}
	if err := k.memory.store(all); err != nil {
		k.log.Warn("credentials of pulls will not outlive this process", "error", err)
	}
}

// repositoryOf is the repository that a reference of CRI means; "" for none, as that
// of an image's ID.
func repositoryOf(ref string) string {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ""
	}
	return reference.TrimNamed(named).Name()
}

// serverOf is the host that an AuthConfig is for. containerd holds it against the
// host that it asks (internal/cri/server/images/image_pull.go, ParseAuth); Docker's
// registry has another name where credentials are concerned.
func serverOf(address string) string {
	for _, scheme := range []string{"https://", "http://"} {
		address = strings.TrimPrefix(address, scheme)
	}
	host, _, _ := strings.Cut(address, "/")
	switch host {
	case "docker.io", "index.docker.io":
		return "registry-1.docker.io"
	}
	return host
}
