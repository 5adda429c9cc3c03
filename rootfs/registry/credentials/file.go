package credentials

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"oras.land/oras-go/v2/registry/remote/auth"
)

const (
	// SecretKey is the key of a secret of type kubernetes.io/dockerconfigjson,
	// and so the name of the file where one is mounted.
	SecretKey  = ".dockerconfigjson"
	maxFile    = 1 << 20 // bytes
	maxSecrets = 256     // files of one directory
)

// File is the source behind a path: a file in the form of Docker's config.json, or a
// directory of pull secrets. It is read whenever it is asked, and need not be there yet.
func File(path string) Source { return file{path} }

// file is a file in the form of Docker's config.json, or a directory of pull
// secrets, whatever is there when it is asked.
type file struct{ path string }

// Credential implements Source.
func (f file) Credential(ctx context.Context, host string) (auth.Credential, error) {
	if info, err := os.Stat(f.path); err == nil && info.IsDir() {
		return secrets(f.path, RepositoryOf(ctx, host))
	}
	return docker(ctx, f.path, RepositoryOf(ctx, host))
}

// secrets looks a repository up in the pull secrets of dir: one that is mounted
// there, or one in each of its directories, in the order of their names. The
// kubelet changes a mounted secret by another target of the link "..data", so a
// file is the old one or the new one.
func secrets(dir, repository string) (auth.Credential, error) {
	files, err := secretFiles(dir)
	if err != nil {
		return auth.EmptyCredential, fmt.Errorf("find pull secrets: %w", err)
	}
	var failed error
	for _, path := range files {
		k, err := readSecret(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("pull secret %s: %w", path, err))
			continue
		}
		if cred := k.Find(repository); cred != auth.EmptyCredential {
			return cred, nil
		}
	}
	return auth.EmptyCredential, failed
}

// secretFiles lists files that may be pull secrets.
func secretFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := []string{filepath.Join(dir, SecretKey)}
	for _, e := range entries {
		if name := e.Name(); !strings.HasPrefix(name, "..") && name != SecretKey && len(files) < maxSecrets {
			files = append(files, filepath.Join(dir, name, SecretKey))
		}
	}
	return files, nil
}

// readSecret reads the credentials that are in a file itself.
func readSecret(path string) (Keyring, error) {
	data, err := ReadFile(path)
	if err != nil {
		return nil, err
	}
	return ParseSecret(data)
}

// ReadFile reads a small file, and refuses a longer one. What is no file is not there
// (fs.ErrNotExist).
func ReadFile(path string) ([]byte, error) {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil, fs.ErrNotExist
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("longer than %d bytes", maxFile)
	}
	return data, err
}
