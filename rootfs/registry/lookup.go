package registry

import (
	"context"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// Lookup is one question for credentials. It travels in the context of
// Config.Credentials, as the host alone does not say it all.
type Lookup struct {
	// Repository is the full name that credentials are wanted for:
	// "docker.io/library/debian". At a mirror it is the mirror's.
	Repository string
	// Refused is set when the answer of the last time has been refused: an
	// answer from a cache will not do.
	Refused bool
	// Expires is for who answers: until when the credential is valid. A new one
	// is looked up before; the zero time means until it is refused.
	Expires time.Time

	// registry ("host:port") and name are those that a mirror on this machine
	// stands in for; or "".
	registry, name string
}

type lookupKey struct{}

// LookupOf returns the Lookup of ctx; of a foreign context it is an empty one.
func LookupOf(ctx context.Context) *Lookup {
	if l, ok := ctx.Value(lookupKey{}).(*Lookup); ok {
		return l
	}
	return &Lookup{}
}

// credential is for auth.Client. What belongs to a registry is for the registry,
// and for a mirror on this machine that has nothing of its own: Dragonfly's
// dfdaemon, for one, passes on what it is given. Other mirrors do not get it.
func (c *Client) credential(ctx context.Context, host string) (auth.Credential, error) {
	if c.cfg.Credentials == nil {
		return auth.EmptyCredential, nil
	}
	cred, err := c.cfg.Credentials(ctx, host)
	l := LookupOf(ctx)
	if l.registry == "" || err != nil || cred != auth.EmptyCredential {
		return cred, err
	}
	l.Repository = l.name
	return c.cfg.Credentials(ctx, l.registry)
}

// WithLookup returns a context whose LookupOf is l.
func WithLookup(ctx context.Context, l *Lookup) context.Context {
	return context.WithValue(ctx, lookupKey{}, l)
}
