package kube

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

// Sources are those of Open.
type Sources []credentials.Source

// Open returns the sources behind paths: a directory of pull secrets, the
// kubelet's CredentialProviderConfig, whose programs are in bin, a kubeconfig, or a
// file in the form of Docker's config.json, which may come later. The caller closes
// them.
func Open(paths []string, bin string, log *slog.Logger) (sources Sources, err error) {
	for _, path := range paths {
		s, err := open(path, bin, log)
		if err != nil {
			return nil, errors.Join(err, sources.Close())
		}
		sources = append(sources, s)
	}
	return sources, nil
}

func open(path, bin string, log *slog.Logger) (credentials.Source, error) {
	p, err := openProviders(path, bin, log)
	if err != nil {
		return nil, fmt.Errorf("credential providers of %s: %w", path, err)
	}
	if p != nil {
		return p, nil
	}
	kube, err := isKubeconfig(path)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	if kube {
		return openCluster(path, log), nil
	}
	return credentials.File(path), nil
}

// Close ends what sources do by themselves.
func (s Sources) Close() error {
	var errs []error
	for _, one := range s {
		if c, ok := one.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}
