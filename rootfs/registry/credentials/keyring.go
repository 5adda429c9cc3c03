package credentials

import (
	"net"
	"net/url"
	"path"
	"slices"
	"strings"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// Keyring has credentials for patterns of repositories, as the kubelet has them
// (kubernetes pkg/credentialprovider/Keyring.go): "registry.io:8080/path",
// "*.azurecr.io", "https://index.docker.io/v1/".
type Keyring map[string]auth.Credential

// hub are the names of Docker's registry. Its key in a config.json is
// "https://index.docker.io/v1/".
var hub = []string{"docker.io", "index.docker.io", "registry-1.docker.io"}

// Find returns the credential of the most specific pattern that matches.
func (k Keyring) Find(repository string) auth.Credential {
	_, cred := k.Match(repository)
	return cred
}

// Match returns the most specific pattern that matches, with its credential; "" for
// none. Longer ones come first, and those without wildcards.
func (k Keyring) Match(repository string) (pattern string, cred auth.Credential) {
	names := []string{repository}
	domain, rest, _ := strings.Cut(repository, "/")
	if slices.Contains(hub, domain) {
		names = nil
		for _, name := range hub {
			names = append(names, name+"/"+rest)
		}
	}
	patterns := make([]string, 0, len(k))
	for p := range k {
		patterns = append(patterns, p)
	}
	slices.Sort(patterns)
	slices.Reverse(patterns)
	for _, p := range patterns {
		if slices.ContainsFunc(names, func(name string) bool { return Matches(p, name) }) {
			return p, k[p]
		}
	}
	return "", auth.EmptyCredential
}

// Matches tells whether a repository, without tag or digest, is one that a
// pattern means: as many parts of the host name, each of which matches, the same
// port, and a path that begins like the pattern's.
func Matches(pattern, repository string) bool {
	glob, ok := split(pattern)
	target, ok2 := split(repository)
	if !ok || !ok2 || glob.port != target.port || len(glob.parts) != len(target.parts) || !strings.HasPrefix(target.path, glob.path) {
		return false
	}
	for i, part := range glob.parts {
		if matched, err := path.Match(part, target.parts[i]); err != nil || !matched {
			return false
		}
	}
	return true
}

type location struct {
	parts      []string // of the host name
	port, path string
}

// ValidPattern tells whether something can be a pattern.
func ValidPattern(pattern string) bool {
	_, ok := split(pattern)
	return ok
}

// split takes a pattern apart. A scheme says nothing, as "/v1/" and "/v2/" do.
func split(pattern string) (location, bool) {
	for _, scheme := range []string{"https://", "http://"} {
		pattern = strings.TrimPrefix(pattern, scheme)
	}
	u, err := url.Parse("https://" + pattern)
	if err != nil || u.Host == "" {
		return location{}, false
	}
	l := location{path: u.Path}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil {
		host, port = u.Host, ""
	}
	l.parts, l.port = strings.Split(host, "."), port
	if strings.HasPrefix(l.path, "/v1/") || strings.HasPrefix(l.path, "/v2/") {
		l.path = l.path[len("/v1"):]
	}
	if l.path == "/" {
		l.path = ""
	}
	return l, true
}
