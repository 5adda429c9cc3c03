package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

const (
	// apiTimeout bounds handshakes with the API server, and its silence.
	apiTimeout = 30 * time.Second
	// firstSync is how long a lookup waits for the first attempt to read the secrets.
	firstSync = 15 * time.Second
	// watchTime is how long one watch lasts; up to as much again is added, so that
	// nodes do not come at once.
	watchTime = 5 * time.Minute
	// Waits after a failure, doubled up to the second.
	minPause, maxPause = time.Second, time.Minute
	// pageSize is how many secrets are in an answer of a list, maxClusterSecrets how
	// many of one type there may be.
	pageSize          = 500
	maxClusterSecrets = 10_000
)

// secretType is one of the two types of pull secrets (kubernetes
// staging/src/k8s.io/api/core/v1/types.go, SecretType).
type secretType struct {
	name, key string
	parse     func([]byte) (credentials.Keyring, error)
}

var secretTypes = []secretType{
	{"kubernetes.io/dockerconfigjson", credentials.SecretKey, credentials.ParseSecret},
	{"kubernetes.io/dockercfg", ".dockercfg", credentials.ParseDockercfg},
}

// cluster has the pull secrets that a kubeconfig may list: in all namespaces, or in
// that of its context. It lists them once and then watches. What it knows stays when
// the API server is away. A registry gets the credential of any namespace: containerd,
// which asks with those of the pod, is who decides whether a pod may have an image.
type cluster struct {
	path   string
	log    *slog.Logger
	cancel context.CancelFunc
	wg     sync.WaitGroup
	tried  credentials.Candidates

	firsts sync.WaitGroup // first lists under way, of each type
	begun  chan struct{}  // closed when these have ended, whatever they brought

	mu     sync.Mutex
	known  []map[string]credentials.Keyring // as secretTypes; by namespace and name; nil until it was listed; protected by mu
	failed error                            // why it was not; protected by mu
}

var (
	_ credentials.Source = (*cluster)(nil)
	_ io.Closer          = (*cluster)(nil)
)

func openCluster(path string, log *slog.Logger) *cluster {
	ctx, cancel := context.WithCancel(context.Background())
	c := &cluster{path: path, log: log, cancel: cancel, known: make([]map[string]credentials.Keyring, len(secretTypes)), failed: errSilent, begun: make(chan struct{})}
	c.firsts.Add(len(secretTypes))
	for i := range secretTypes {
		c.wg.Go(func() { c.follow(ctx, i) })
	}
	c.wg.Go(func() { c.firsts.Wait(); close(c.begun) })
	return c
}

// Close ends the watch.
func (c *cluster) Close() error {
	c.cancel()
	c.wg.Wait()
	return nil
}

// Credential implements Source.
func (c *cluster) Credential(ctx context.Context, host string) (auth.Credential, error) {
	wait := time.NewTimer(firstSync)
	defer wait.Stop()
	select {
	case <-c.begun:
	case <-ctx.Done():
		return auth.EmptyCredential, ctx.Err()
	case <-wait.C:
	}
	if err := c.missing(); err != nil {
		return auth.EmptyCredential, fmt.Errorf("pull secrets by kubeconfig %s are not read yet: %w", c.path, err)
	}
	name := credentials.RepositoryOf(ctx, host)
	return c.tried.Choose(ctx, name, c.find(name)), nil
}

// missing is why not every type was listed; nil when each was.
func (c *cluster) missing() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, known := range c.known {
		if known == nil {
			return c.failed
		}
	}
	return nil
}

// find lists the credentials for a repository: those with the most specific pattern
// first, then by namespace and name.
func (c *cluster) find(repository string) []auth.Credential {
	type match struct {
		pattern, secret string
		cred            auth.Credential
	}
	var all []match
	c.mu.Lock()
	for _, known := range c.known {
		for secret, keys := range known {
			if pattern, cred := keys.Match(repository); pattern != "" {
				all = append(all, match{pattern, secret, cred})
			}
		}
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b match) int {
		if n := strings.Compare(b.pattern, a.pattern); n != 0 {
			return n
		}
		return strings.Compare(a.secret, b.secret)
	})
	var list []auth.Credential
	for _, m := range all {
		if !slices.Contains(list, m.cred) {
			list = append(list, m.cred)
		}
	}
	return list
}

// follow keeps the secrets of one type up to date until ctx ends. It reads the
// kubeconfig again after each failure: that is when a certificate was renewed.
func (c *cluster) follow(ctx context.Context, i int) {
	pause := minPause
	first := sync.OnceFunc(c.firsts.Done)
	defer first()
	for ctx.Err() == nil {
		began := time.Now()
		err := c.once(ctx, i, first)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > watchTime {
			pause = minPause
		}
		if !errors.Is(err, errGone) {
			c.log.Warn("pull secrets of the cluster cannot be followed; those that are known count", "kubeconfig", c.path, "type", secretTypes[i].name, "error", err)
			c.mu.Lock()
			c.failed = err
			c.mu.Unlock()
		}
		first()
		_ = sleep(ctx, pause/2+rand.N(pause)) // the loop sees the end
		pause = min(2*pause, maxPause)
	}
}

var errSilent = errors.New("the API server has not answered yet")

// errGone is what a watch, or a list of several pages, ends with when the server does
// not remember from where it should go on: a new list is needed.
var errGone = errors.New("the API server does not go on from there")

// once lists, calls listed, and then watches until that fails.
func (c *cluster) once(ctx context.Context, i int, listed func()) error {
	api, err := connect(ctx, c.path)
	if err != nil {
		return err
	}
	defer api.close()
	version, err := c.list(ctx, api, i)
	if err == nil {
		listed()
	}
	for err == nil {
		if version, err = c.watch(ctx, api, i, version); err == nil {
			err = sleep(ctx, rand.N(minPause)) // a server may end every watch at once
		}
	}
	return err
}

// sleep returns after d, or with the error of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// secret is what we need of one.
type secret struct {
	Metadata struct {
		Namespace       string `json:"namespace"`
		Name            string `json:"name"`
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Data map[string][]byte `json:"data"`
}

func (s *secret) name() string { return s.Metadata.Namespace + "/" + s.Metadata.Name }

type secretList struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
		Continue        string `json:"continue"`
	} `json:"metadata"`
	Items []secret `json:"items"`
}

func (t secretType) query() url.Values { return url.Values{"fieldSelector": {"type=" + t.name}} }

// list replaces what is known and returns the version that a watch begins after.
func (c *cluster) list(ctx context.Context, api *apiServer, i int) (version string, err error) {
	known := map[string]credentials.Keyring{}
	query := secretTypes[i].query()
	query.Set("limit", strconv.Itoa(pageSize))
	for {
		page, err := listPage(ctx, api, query)
		if err != nil {
			return "", fmt.Errorf("list secrets: %w", err)
		}
		for _, s := range page.Items {
			c.put(known, i, &s)
		}
		if len(known) > maxClusterSecrets {
			return "", fmt.Errorf("list secrets: there are more than %d of type %s: name one namespace in the context", maxClusterSecrets, secretTypes[i].name)
		}
		if page.Metadata.Continue == "" {
			version = page.Metadata.ResourceVersion
			break
		}
		query.Set("continue", page.Metadata.Continue)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known[i] = known
	return version, nil
}

func listPage(ctx context.Context, api *apiServer, query url.Values) (page secretList, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*apiTimeout)
	defer cancel()
	body, err := api.get(ctx, query)
	if err != nil {
		return page, err
	}
	defer body.Close()
	data, err := io.ReadAll(io.LimitReader(body, maxAPIAnswer+1))
	if err == nil && len(data) > maxAPIAnswer {
		err = fmt.Errorf("an answer is longer than %d bytes", maxAPIAnswer)
	}
	if err == nil && json.Unmarshal(data, &page) != nil {
		err = errors.New("an answer is no list of secrets")
	}
	return page, err
}

// put adds a secret to known. One that cannot be decoded is left out, as the kubelet
// does it.
func (c *cluster) put(known map[string]credentials.Keyring, i int, s *secret) {
	delete(known, s.name())
	keys, err := secretTypes[i].parse(s.Data[secretTypes[i].key])
	if err != nil {
		c.log.Warn("a pull secret is left out", "secret", s.name(), "error", err)
		return
	}
	known[s.name()] = keys
}

// event is one of a watch.
type event struct {
	Type   string          `json:"type"`
	Object json.RawMessage `json:"object"`
}

// watch follows changes after version until the server ends that, and returns the
// version to go on from.
func (c *cluster) watch(ctx context.Context, api *apiServer, i int, version string) (string, error) {
	length := watchTime + rand.N(watchTime)
	ctx, cancel := context.WithTimeout(ctx, length+apiTimeout)
	defer cancel()
	query := secretTypes[i].query()
	query.Set("watch", "1")
	query.Set("allowWatchBookmarks", "true")
	query.Set("resourceVersion", version)
	query.Set("timeoutSeconds", strconv.Itoa(int(length/time.Second)))
	body, err := api.get(ctx, query)
	if err != nil {
		return "", fmt.Errorf("watch secrets: %w", err)
	}
	defer body.Close()
	bound := &io.LimitedReader{R: body}
	events := json.NewDecoder(bound)
	for {
		bound.N = maxAPIAnswer
		var e event
		if err := events.Decode(&e); errors.Is(err, io.EOF) && bound.N > 0 {
			return version, nil
		} else if err != nil {
			return "", errors.New("watch secrets: it broke off")
		}
		if version, err = c.apply(i, e); err != nil {
			return "", err
		}
	}
}

// apply takes a change over and returns its version.
func (c *cluster) apply(i int, e event) (version string, err error) {
	if e.Type == "ERROR" {
		return "", errGone // a Status, mostly of code 410: whatever it is, a list tells
	}
	var s secret
	if json.Unmarshal(e.Object, &s) != nil || s.Metadata.ResourceVersion == "" {
		return "", errors.New("watch secrets: an event is not of a secret")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch known := c.known[i]; e.Type {
	case "ADDED", "MODIFIED":
		if len(known) >= maxClusterSecrets && known[s.name()] == nil {
			return "", fmt.Errorf("watch secrets: there are more than %d of type %s: name one namespace in the context", maxClusterSecrets, secretTypes[i].name)
		}
		c.put(known, i, &s)
	case "DELETED":
		delete(known, s.name())
	}
	return s.Metadata.ResourceVersion, nil
}
