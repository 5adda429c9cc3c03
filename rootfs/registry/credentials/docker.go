package credentials

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"
	"strings"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// dockerConfig is what Docker's config.json says of credentials (docs.docker.com,
// "docker login"); a pull secret has the same form.
type dockerConfig struct {
	Auths       map[string]Login  `json:"auths"`
	CredHelpers map[string]string `json:"credHelpers"` // by registry
	CredsStore  string            `json:"credsStore"`  // helper for all other registries
}

// Login is what one registry is told, in the form that config.json, pull secrets
// and the AuthConfig of CRI have in common.
type Login struct {
	Auth          string `json:"auth"` // base64 of user:password
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

var errForm = errors.New("it is not in the form of Docker's config.json: {\"auths\": {\"host\": {\"auth\": base64 of user:password}}}")

// parseDocker reads a config.json. Its errors quote nothing of it.
func parseDocker(data []byte) (dockerConfig, Keyring, error) {
	var c dockerConfig
	if len(bytes.TrimSpace(data)) == 0 {
		return c, nil, nil
	}
	if json.Unmarshal(data, &c) != nil {
		return c, nil, errForm
	}
	k, err := ring(c.Auths)
	return c, k, err
}

// ParseSecret reads a pull secret of type kubernetes.io/dockerconfigjson. Its errors
// quote nothing of it.
func ParseSecret(data []byte) (Keyring, error) {
	_, k, err := parseDocker(data)
	return k, err
}

// ParseDockercfg reads one of type kubernetes.io/dockercfg, the older form, which has
// only what is below "auths" now.
func ParseDockercfg(data []byte) (Keyring, error) {
	var auths map[string]Login
	if json.Unmarshal(data, &auths) != nil {
		return nil, errForm
	}
	return ring(auths)
}

func ring(auths map[string]Login) (Keyring, error) {
	k := Keyring{}
	for pattern, l := range auths {
		cred, err := l.Credential()
		if err != nil {
			return nil, err
		}
		k[pattern] = cred
	}
	return k, nil
}

// Credential decodes a login. Its errors quote nothing of it.
func (l Login) Credential() (auth.Credential, error) {
	c := auth.Credential{Username: l.Username, Password: l.Password, RefreshToken: l.IdentityToken, AccessToken: l.RegistryToken}
	if l.Auth == "" {
		return c, nil
	}
	plain, err := base64.StdEncoding.DecodeString(l.Auth)
	user, password, ok := strings.Cut(string(plain), ":")
	if err != nil || !ok {
		return auth.EmptyCredential, errForm
	}
	c.Username, c.Password = user, strings.TrimRight(password, "\x00")
	return c, nil
}

// docker looks a repository up in a config.json, which need not be there.
func docker(ctx context.Context, path, repository string) (auth.Credential, error) {
	data, err := ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return auth.EmptyCredential, nil
	}
	if err != nil {
		return auth.EmptyCredential, fmt.Errorf("read credentials: %w", err)
	}
	c, k, err := parseDocker(data)
	if err != nil {
		return auth.EmptyCredential, fmt.Errorf("read credentials %s: %w", path, err)
	}
	name, server := c.helper(RegistryOf(repository))
	if name == "" {
		return k.Find(repository), nil
	}
	cred, err := ask(ctx, name, server)
	if err != nil {
		return auth.EmptyCredential, fmt.Errorf("credentials %s for %s: %w", path, server, err)
	}
	return cred, nil
}

// hubServer is what Docker calls its registry where credentials are concerned
// (moby/registry/config.go, IndexServer).
const hubServer = "https://index.docker.io/v1/"

// helper returns the helper for a registry, "" for none, and what it calls the
// registry.
func (c dockerConfig) helper(domain string) (name, server string) {
	keys := []string{domain}
	server = domain
	if slices.Contains(hub, domain) {
		server = hubServer
		keys = append([]string{hubServer}, hub...)
	}
	for _, key := range keys {
		if name := c.CredHelpers[key]; name != "" {
			return name, server
		}
	}
	return c.CredsStore, server
}

// The words of the protocol (docker/docker-credential-helpers,
// credentials/error.go and client/client.go): the one has exit status 1, the
// other stands for a user when the secret is an identity token.
const (
	notFound  = "credentials not found in native keychain"
	tokenUser = "<token>"
)

// ask runs the helper docker-credential-<name>.
func ask(ctx context.Context, name, server string) (auth.Credential, error) {
	if strings.ContainsAny(name, "/ ") {
		return auth.EmptyCredential, fmt.Errorf("credential helper %q: give a name without docker-credential-", name)
	}
	p := Program{Path: "docker-credential-" + name, Args: []string{"get"}}
	out, err := p.Run(ctx, []byte(server))
	var exit *exec.ExitError
	if errors.As(err, &exit) && string(bytes.TrimSpace(out)) == notFound {
		return auth.EmptyCredential, nil
	}
	if err != nil {
		return auth.EmptyCredential, fmt.Errorf("credential helper %s: %w (run \"echo %s | %s get\" to see why)", p.Path, err, server, p.Path)
	}
	var answer struct{ Username, Secret string }
	if json.Unmarshal(out, &answer) != nil {
		return auth.EmptyCredential, fmt.Errorf("credential helper %s: its answer is not JSON of Username and Secret", p.Path)
	}
	if answer.Username == tokenUser {
		return auth.Credential{RefreshToken: answer.Secret}, nil
	}
	return auth.Credential{Username: answer.Username, Password: answer.Secret}, nil
}
