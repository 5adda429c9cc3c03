package credentials

import (
	"context"
	"errors"
	"log/slog"
	"strings"

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

// repository is what credentials are wanted for.
func RepositoryOf(ctx context.Context, host string) string {
	if name := registry.LookupOf(ctx).Repository; name != "" {
		return name
	}
	return host
}

// RegistryOf is the registry of an image, as it is written.
func RegistryOf(image string) string {
	domain, _, _ := strings.Cut(image, "/")
	return domain
}
