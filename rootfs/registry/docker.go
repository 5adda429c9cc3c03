package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// DockerCredentials returns the credentials of Docker's config.json (in
// $DOCKER_CONFIG or ~/.docker), credential helpers included. The file is read
// again whenever a token is needed, so that a new login counts at once; an
// absent file means anonymous access.
func DockerCredentials() auth.CredentialFunc {
	return func(ctx context.Context, host string) (auth.Credential, error) {
		store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
		if err != nil {
			return auth.EmptyCredential, fmt.Errorf("read the credentials of docker's config.json: %w", mute(err))
		}
		cred, err := credentials.Credential(store)(ctx, host)
		if err != nil {
			return auth.EmptyCredential, fmt.Errorf("credentials of docker's config.json for %s: %w", host, mute(err))
		}
		return cred, nil
	}
}

var errMuted = errors.New("it is not in the form of config.json (auth is base64 of user:password), or its credential helper fails: run docker-credential-... get to see why")

// mute takes secrets out of an error of oras-go: it quotes an auth field that
// has no colon, and all that a helper which fails has printed.
func mute(err error) error {
	var start *exec.Error
	var exit *exec.ExitError
	var file *fs.PathError
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) ||
		errors.As(err, &start) || errors.As(err, &exit) || errors.As(err, &file) {
		return err
	}
	return errMuted
}
