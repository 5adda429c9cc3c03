package registry

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// downFor is how long a mirror that cannot be reached, or that fails, is not
// asked. One that says Retry-After is left alone for so long, up to maxRetryAfter.
const downFor = 10 * time.Second

// refusedFor is how long a mirror is not asked for a repository for which it
// wants other credentials.
const refusedFor = 30 * time.Second

var errLate = errors.New("no byte for several times as long as usual, another request was faster")

var errSlow = errors.New("no answer before the end of the time that the caller has")

// each calls do with this repository at one host after the other, of those that
// can do what is wanted, until it succeeds. Any failure of a mirror is a reason
// to ask the next host, as containerd does it: it may lack the content (404),
// want credentials that nobody has, or be down, which is remembered. The last
// host's error is what comes out; it tells of the others.
func (r *Repository) each(ctx context.Context, want Capabilities, do func(*Repository) error) error {
	if r.link != nil {
		return do(r)
	}
	hosts := r.hosts(want)
	if len(hosts) == 0 {
		e := r.fault("repository", errdefs.ErrFailedPrecondition, errors.New("no host has the capability that this needs"))
		e.Remedy = "look at capabilities in hosts.toml"
		return e
	}
	var failed []error
	for _, one := range hosts {
		if !one.last && one.down() {
			continue
		}
		err := do(one)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) && !one.last {
			one.giveUp(one.fault("repository", errdefs.ErrUnavailable, errSlow)) // whoever asks next shall not wait for it
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
		if one.last {
			return tell(err, failed)
		}
		one.giveUp(err)
		failed = append(failed, err)
	}
	return nil // not reached: the last one returns
}

// tell adds the failures of the hosts that were asked before.
func tell(err error, before []error) error {
	var e *Error
	if errors.As(err, &e) {
		e.Before = before
	}
	return err
}

// hosts returns this repository at each host that can do what is wanted, the
// registry itself last.
func (r *Repository) hosts(want Capabilities) []*Repository {
	if r.link != nil {
		return []*Repository{r}
	}
	domain := reference.Domain(r.name)
	known := r.client.cfg.Hosts(domain)
	if len(known) == 0 {
		return []*Repository{r.client.registry(r.name)}
	}
	var list []*Repository
	for _, h := range known {
		if h.Capabilities.Has(want) {
			list = append(list, r.client.at(h, r.name))
		}
	}
	if len(list) > 0 {
		list[len(list)-1].last = true
	}
	return list
}

// at is the repository that name means, at h. As containerd does it, a host
// that is not the registry itself is told the registry (core/remotes/docker/
// registry.go, isProxy).
func (c *Client) at(h *Host, name reference.Named) *Repository {
	r := &Repository{client: c, link: c.link(h), host: h.Name, scheme: h.Scheme, root: h.Path, name: reference.TrimNamed(name)}
	if domain := reference.Domain(name); h.Name != domain && h.Name != registryOf(domain) {
		r.ns = domain
	}
	return r
}

// one returns the repository at the host that is asked first for want, when
// what follows has to be said to one and the same host.
func (r *Repository) one(want Capabilities) (*Repository, error) {
	if r.link != nil {
		return r, nil
	}
	hosts := r.hosts(want)
	if len(hosts) == 0 {
		e := r.fault("repository", errdefs.ErrFailedPrecondition, errors.New("no host takes pushes"))
		e.Remedy = "look at capabilities in hosts.toml"
		return nil, e
	}
	hosts[0].last = true // nobody else is asked
	return hosts[0], nil
}

// down tells whether a mirror is not to be asked for this repository now.
func (r *Repository) down() bool {
	now, known := time.Now(), &r.client.hosts
	return now.Before(known.get(r.host).down) || now.Before(known.get(r.place()).down)
}

// place is the name under which is remembered what concerns a mirror and one
// repository.
func (r *Repository) place() string { return r.host + " " + r.Name() }

// giveUp notes that a mirror failed. What concerns one object says nothing of
// the mirror.
func (r *Repository) giveUp(err error) {
	log := r.client.log.With("mirror", r.host, "repository", r.Name(), "error", err)
	if errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err) {
		log.Info("a mirror wants other credentials, the next host is asked", "again", refusedFor)
		r.client.hosts.set(r.place(), func(s *hostState) { s.down = time.Now().Add(refusedFor) })
		return
	}
	if !errdefs.IsUnavailable(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsResourceExhausted(err) {
		log.Debug("a mirror does not serve this, the next host is asked")
		return
	}
	wait := downFor
	var e *Error
	if errors.As(err, &e) && e.retryAfter > 0 {
		wait = min(e.retryAfter, maxRetryAfter)
	}
	if !r.down() {
		log.Warn("a mirror fails, the next host is asked", "again", wait)
	}
	r.client.hosts.set(r.host, func(s *hostState) { s.down = time.Now().Add(wait) })
}
