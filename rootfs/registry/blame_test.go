package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/distribution/reference"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// blamer is what Trailed returns.
type blamer interface {
	io.ReadCloser
	Blame(error) bool
}

// trailed reads a range, and returns its body.
func (p *pair) trailed(t *testing.T, repo *registry.Repository, off, n int64) ([]byte, blamer) {
	t.Helper()
	rc, err := registry.Trailed(t.Context(), func(ctx context.Context) (io.ReadCloser, error) {
		return repo.LayerBlob(p.desc).ReadRange(ctx, off, n)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = rc.Close() }() // it only was read
	got, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return got, rc.(blamer)
}

var errWrong = errors.New("another digest")

// TestBlame has a mirror with wrong bytes: once it is blamed the registry is asked,
// also for other blobs, and it has nobody behind it.
func TestBlame(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	p.mirror.Fault("/blobs/", 0, registrytest.Corrupt(2000))
	m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, ""))
	repo := repository(t, m.client, p.origin)
	got, body := p.trailed(t, repo, 1000, 5000)
	if bytes.Equal(got, p.data[1000:6000]) {
		t.Fatal("the mirror's bytes are right")
	}
	if !body.Blame(errWrong) || body.Blame(errWrong) {
		t.Error("the mirror is not blamed, or twice")
	}
	got, body = p.trailed(t, repo, 1000, 5000)
	if !bytes.Equal(got, p.data[1000:6000]) || asked(p.mirror) != 1 || asked(p.origin) != 1 {
		t.Errorf("the mirror was asked %d times, the registry %d times", asked(p.mirror), asked(p.origin))
	}
	if body.Blame(errWrong) {
		t.Error("somebody is asked instead of the registry")
	}
	for _, reg := range []*registrytest.Server{p.mirror, p.origin} {
		if s := hostStats(t, m.client, reg.Host()); s.Wrong != 1 {
			t.Errorf("counted %+v", s)
		}
	}
	if log := m.log.String(); strings.Count(log, "gave wrong bytes") != 2 || !strings.Contains(log, errWrong.Error()) {
		t.Errorf("logged %s", log)
	}
}

// TestBlameOfOneRepository still asks a blamed mirror for other repositories.
func TestBlameOfOneRepository(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	p.mirror.PushBlob("library/y", "", p.data)
	p.origin.PushBlob("library/y", "", p.data)
	m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, ""))
	if _, body := p.trailed(t, repository(t, m.client, p.origin), 0, 5000); !body.Blame(errWrong) {
		t.Error("the mirror is not blamed")
	}
	name, err := reference.ParseNormalizedNamed(p.origin.Host() + "/library/y")
	if err != nil {
		t.Fatal(err)
	}
	p.read(t, m.client.Repository(name), 0, 5000)
	if asked(p.mirror) != 2 || asked(p.origin) != 0 {
		t.Errorf("the mirror was asked %d times, the registry %d times", asked(p.mirror), asked(p.origin))
	}
}

// TestBlameInTheMiddle blames all hosts of a range that two have given.
func TestBlameInTheMiddle(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	p.mirror.Fault("/blobs/", 0, registrytest.Corrupt(1), registrytest.Truncate(3000))
	m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, ""))
	_, body := p.trailed(t, repository(t, m.client, p.origin), 0, 5000)
	if !body.Blame(errWrong) {
		t.Error("the mirror is not blamed")
	}
}

// TestBlameTarget forgets where the registry redirects to.
func TestBlameTarget(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Redirect: true})
	p := &pair{data: random(100_000)}
	p.desc = reg.PushBlob("library/x", "", p.data)
	repo := repository(t, newClient(t, fast()), reg)
	for range 2 {
		if _, body := p.trailed(t, repo, 0, 10); body.Blame(errWrong) {
			t.Error("somebody is asked instead of the registry")
		}
	}
	if n := len(reg.Requests("/v2/library/x/blobs/")); n != 2 {
		t.Errorf("the registry was asked %d times", n)
	}
}

// TestWrongManifest leaves a mirror alone that gives another manifest than was
// asked for, or another small blob.
func TestWrongManifest(t *testing.T) {
	for _, kind := range []string{"/manifests/", "/blobs/"} {
		p := newPair(t, registrytest.Options{})
		img := p.origin.PushImage("library/x", "v1", registrytest.Image{})
		p.mirror.PushImage("library/x", "v1", registrytest.Image{})
		p.mirror.Fault(kind, 0, registrytest.Corrupt(20))
		m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, ""))
		repo := repository(t, m.client, p.origin)
		for range 2 {
			_, err := repo.Manifest(t.Context(), img.Desc)
			if kind == "/blobs/" {
				_, err = repo.Blob(t.Context(), img.Config)
			}
			if err != nil {
				t.Error(err)
			}
		}
		if n := len(p.mirror.Requests(kind)); n != 1 {
			t.Errorf("%s: the mirror was asked %d times", kind, n)
		}
	}
}
