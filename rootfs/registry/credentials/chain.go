package credentials

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// Source is one place for credentials. Credential returns what to present to a
// host ("host:port"); registry.LookupOf tells for which repository. None is
// auth.EmptyCredential.
type Source interface {
	Credential(ctx context.Context, host string) (auth.Credential, error)
}

// Chain returns the credential of the first source that has one. With a nil
// log nothing is logged.
func Chain(log *slog.Logger, sources ...Source) auth.CredentialFunc {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return func(ctx context.Context, host string) (auth.Credential, error) {
		var failed error
		for _, s := range sources {
			cred, err := s.Credential(ctx, host)
			if err != nil {
				failed = errors.Join(failed, err)
				continue
			}
			if cred == auth.EmptyCredential {
				continue
			}
			if failed != nil {
				log.Warn("a source of credentials fails, another one has them", "registry", host, "error", failed)
			}
			return cred, nil
		}
		return auth.EmptyCredential, failed
	}
}

// Open returns the sources behind paths: a directory of pull secrets, the
// kubelet's CredentialProviderConfig, whose programs are in bin, or a file in
// the form of Docker's config.json, which may come later.
func Open(paths []string, bin string) ([]Source, error) {
	var sources []Source
	for _, path := range paths {
		p, err := openProviders(path, bin)
		if err != nil {
			return nil, fmt.Errorf("credential providers of %s: %w", path, err)
		}
		if p != nil {
			sources = append(sources, p)
			continue
		}
		sources = append(sources, file{path: path})
	}
	return sources, nil
}

// repository is what credentials are wanted for.
func repository(ctx context.Context, host string) string {
	if name := registry.LookupOf(ctx).Repository; name != "" {
		return name
	}
	return host
}
