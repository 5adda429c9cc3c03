package kube

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

// API versions of the kubelet's file and of the requests to its providers. The
// later versions of each read like the earlier ones, as far as we look.
const (
	configGroup   = "kubelet.config.k8s.io/"
	providerGroup = "credentialprovider.kubelet.k8s.io/"
)

var versions = []string{"v1", "v1beta1", "v1alpha1"}

// maxProviders bounds the providers of one file.
const maxProviders = 64

// providersFile is the kubelet's CredentialProviderConfig
// (kubernetes staging/src/k8s.io/kubelet/config/v1/types.go).
type providersFile struct {
	APIVersion string     `yaml:"apiVersion"`
	Kind       string     `yaml:"kind"`
	Providers  []provider `yaml:"providers"`
}

type provider struct {
	Name                 string   `yaml:"name"`
	MatchImages          []string `yaml:"matchImages"`
	DefaultCacheDuration *string  `yaml:"defaultCacheDuration"`
	APIVersion           string   `yaml:"apiVersion"`
	Args                 []string `yaml:"args"`
	Env                  []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	TokenAttributes *struct {
		RequireServiceAccount *bool `yaml:"requireServiceAccount"`
	} `yaml:"tokenAttributes"`
}

// providers are those of one file, in its order.
type providers []*plugin

// openProviders reads the kubelet's file; it is nil for any other file, and for
// none.
func openProviders(path, bin string, log *slog.Logger) (credentials.Source, error) {
	data, err := credentials.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := parseProviders(data)
	if f == nil || err != nil {
		return nil, err
	}
	if !filepath.IsAbs(bin) {
		return nil, errors.New("the directory of their programs is not set: the kubelet has it as --image-credential-provider-bin-dir")
	}
	list := providers{}
	for _, p := range f.Providers {
		if p.needsToken() {
			log.Warn("a credential provider is left out: it needs tokens of service accounts, which only the kubelet has; with cri.image_service its answers are known from pulls",
				"provider", p.Name, "config", path)
			continue
		}
		plugin, err := p.plugin(bin)
		if err != nil {
			return nil, fmt.Errorf("provider %q: %w", p.Name, err)
		}
		list = append(list, plugin)
	}
	return list, nil
}

// parseProviders returns nil for what is not a CredentialProviderConfig. JSON is
// YAML, too.
func parseProviders(data []byte) (*providersFile, error) {
	var f providersFile
	if err := yaml.Unmarshal(data, &f); err != nil {
		if f.Kind != "CredentialProviderConfig" {
			return nil, nil
		}
		return nil, errors.New("it cannot be decoded; does the kubelet take it?")
	}
	if f.Kind != "CredentialProviderConfig" {
		return nil, nil
	}
	if !known(configGroup, f.APIVersion) {
		return nil, fmt.Errorf("apiVersion %q: give %sv1", f.APIVersion, configGroup)
	}
	if n := len(f.Providers); n == 0 || n > maxProviders {
		return nil, fmt.Errorf("there are %d providers: give 1 to %d", n, maxProviders)
	}
	return &f, nil
}

func known(group, version string) bool {
	v, ok := strings.CutPrefix(version, group)
	return ok && slices.Contains(versions, v)
}

// plugin checks what the kubelet checks (kubernetes
// pkg/credentialprovider/plugin/config.go).
func (p provider) plugin(bin string) (*plugin, error) {
	if p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/ ") {
		return nil, errors.New("name: give the name of a program")
	}
	if !known(providerGroup, p.APIVersion) {
		return nil, fmt.Errorf("apiVersion %q: give %sv1", p.APIVersion, providerGroup)
	}
	if len(p.MatchImages) == 0 {
		return nil, errors.New("matchImages: give at least one")
	}
	for _, pattern := range p.MatchImages {
		if !credentials.ValidPattern(pattern) {
			return nil, fmt.Errorf("matchImages %q: it is no pattern of images", pattern)
		}
	}
	if p.DefaultCacheDuration == nil {
		return nil, errors.New("defaultCacheDuration: give one, as \"12h\"")
	}
	life, err := time.ParseDuration(*p.DefaultCacheDuration)
	if err != nil || life < 0 {
		return nil, fmt.Errorf("defaultCacheDuration %q: write \"12h\"", *p.DefaultCacheDuration)
	}
	out := &plugin{
		Program:    credentials.Program{Path: filepath.Join(bin, p.Name), Args: p.Args},
		apiVersion: p.APIVersion, match: p.MatchImages, life: life,
	}
	for _, e := range p.Env {
		out.Env = append(out.Env, e.Name+"="+e.Value)
	}
	return out, nil
}

// needsToken says that a provider does nothing without the token of a pod's service
// account (KEP-4412). It is made for one pod, which a read of an image is not.
func (p provider) needsToken() bool {
	t := p.TokenAttributes
	return t != nil && (t.RequireServiceAccount == nil || *t.RequireServiceAccount)
}

// Credential implements Source.
func (list providers) Credential(ctx context.Context, host string) (auth.Credential, error) {
	image := credentials.RepositoryOf(ctx, host)
	var failed error
	for _, p := range list {
		if !slices.ContainsFunc(p.match, func(pattern string) bool { return credentials.Matches(pattern, image) }) {
			continue
		}
		cred, err := p.credential(ctx, image)
		if err != nil {
			failed = errors.Join(failed, err)
		}
		if cred != auth.EmptyCredential {
			return cred, nil
		}
	}
	return auth.EmptyCredential, failed
}
