package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

const (
	// maxCached bounds the answers of a provider; a full cache starts again empty.
	maxCached = 1024
	// refusedAge is how old an answer must be for a refusal to count against it:
	// a registry that refuses all does not have a provider run for each request.
	refusedAge = 5 * time.Second
)

// plugin is a credential provider of the kubelet: a program that gets a request
// on its input and answers on its output (kubernetes
// pkg/credentialprovider/plugin/plugin.go and
// staging/src/k8s.io/kubelet/pkg/apis/credentialprovider/v1/types.go).
type plugin struct {
	credentials.Program
	apiVersion string
	match      []string      // patterns of images
	life       time.Duration // of an answer that does not say; 0 is not cached

	running singleflight.Group // by image

	mu    sync.Mutex
	cache map[string]answer // by image, registry or globalKey; protected by mu
}

// globalKey is no image and no registry.
const globalKey = ""

// answer is what a provider said.
type answer struct {
	keys    credentials.Keyring
	made    time.Time
	expires time.Time // zero: good for one lookup
}

func (a answer) valid(now time.Time) bool { return now.Before(a.expires) }

// fresh answers need no new one yet: a quarter of the time is for renewing.
func (a answer) fresh(now time.Time) bool {
	return now.Before(a.made.Add(a.expires.Sub(a.made) * 3 / 4))
}

// credential returns the answer for an image, from the cache when it is good
// for it. A valid answer stands in for a provider that fails.
func (p *plugin) credential(ctx context.Context, image string) (auth.Credential, error) {
	lookup := registry.LookupOf(ctx)
	old, ok := p.cached(image)
	now := time.Now()
	again := lookup.Refused && now.Sub(old.made) >= refusedAge
	if ok && old.fresh(now) && !again {
		lookup.Expires = old.expires
		return old.keys.Find(image), nil
	}
	v, err, _ := p.running.Do(image, func() (any, error) { return p.ask(ctx, image) })
	if err == nil {
		a := v.(answer)
		lookup.Expires = a.expires
		return a.keys.Find(image), nil
	}
	if ok && old.valid(now) && !lookup.Refused {
		lookup.Expires = old.expires
		return old.keys.Find(image), nil
	}
	return auth.EmptyCredential, err
}

// cached returns the valid answer for an image: one of its own, of its
// registry, or of all.
func (p *plugin) cached(image string) (answer, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, key := range []string{image, credentials.RegistryOf(image), globalKey} {
		if a, ok := p.cache[key]; ok && a.valid(time.Now()) {
			return a, true
		}
	}
	return answer{}, false
}

// ask runs the provider and keeps its answer as long as it says.
func (p *plugin) ask(ctx context.Context, image string) (answer, error) {
	request, err := p.request(image)
	if err != nil {
		return answer{}, err
	}
	out, err := p.Run(ctx, request)
	if err != nil {
		return answer{}, fmt.Errorf("credential provider %s for %s: %w (run it by hand to see why: it reads %s)", p.Path, image, err, request)
	}
	key, a, err := p.decode(out, image, time.Now())
	if err != nil {
		return answer{}, fmt.Errorf("credential provider %s for %s: %w", p.Path, image, err)
	}
	if a.expires.IsZero() {
		return a, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cache == nil || len(p.cache) >= maxCached {
		p.cache = map[string]answer{}
	}
	p.cache[key] = a
	return a, nil
}

// request returns the input of a run.
func (p *plugin) request(image string) ([]byte, error) {
	return json.Marshal(map[string]string{
		"kind": "CredentialProviderRequest", "apiVersion": p.apiVersion, "image": image,
	})
}

// response is CredentialProviderResponse.
type response struct {
	APIVersion    string  `json:"apiVersion"`
	Kind          string  `json:"kind"`
	CacheKeyType  string  `json:"cacheKeyType"`
	CacheDuration *string `json:"cacheDuration"`
	Auth          map[string]struct {
		Username string `json:"username"`
		Password string `json:"password"`
	} `json:"auth"`
}

// decode reads an answer that came at now, and the key it is to be cached by.
// Its errors quote nothing of it.
func (p *plugin) decode(data []byte, image string, now time.Time) (key string, a answer, err error) {
	var r response
	if json.Unmarshal(data, &r) != nil {
		return "", answer{}, errors.New("its answer is not JSON of a CredentialProviderResponse")
	}
	if r.Kind != "CredentialProviderResponse" || r.APIVersion != p.apiVersion {
		return "", answer{}, fmt.Errorf("its answer is not of kind CredentialProviderResponse and version %s", p.apiVersion)
	}
	switch r.CacheKeyType {
	case "Image":
		key = image
	case "Registry":
		key = credentials.RegistryOf(image)
	case "Global":
		key = globalKey
	default:
		return "", answer{}, errors.New("its answer has no cacheKeyType of Image, Registry or Global")
	}
	life := p.life
	if r.CacheDuration != nil {
		if life, err = time.ParseDuration(*r.CacheDuration); err != nil {
			return "", answer{}, errors.New("its answer has a cacheDuration that is no duration")
		}
	}
	a = answer{keys: credentials.Keyring{}, made: now}
	if life > 0 {
		a.expires = now.Add(life)
	}
	for pattern, c := range r.Auth {
		a.keys[pattern] = auth.Credential{Username: c.Username, Password: c.Password}
	}
	return key, a, nil
}
