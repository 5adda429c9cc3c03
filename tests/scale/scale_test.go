package scale

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// patience bounds all sandboxes of a test.
const patience = 5 * time.Minute

// Many sandboxes of one image on a node that has nothing cost the registry what one
// costs: no byte of a layer is sent twice, and each further sandbox asks at most once
// whether the tag still means the same image, which no registry counts as a pull.
func TestSandboxes(t *testing.T) {
	const count = 8
	if why := missing(); why != "" {
		t.Skip(why)
	}
	t.Setenv("TMPDIR", t.TempDir()) // the sandboxes' own directories
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			a, err := newApplication(f.make, 16, 256<<10)
			if err != nil {
				t.Fatal(err)
			}
			lazy := f.name != "gzip"
			alone, many := measure(t, a, lazy, 1), measure(t, a, lazy, count)
			t.Logf("one sandbox: %+v; %d: %+v", alone, count, many)
			if many.bytes > a.size || !lazy && many.bytes != a.size {
				t.Errorf("%d bytes of layers came from the registry, the image has %d", many.bytes, a.size)
			}
			if many.manifests != alone.manifests {
				t.Errorf("%d manifests were fetched for %d sandboxes, %d for one", many.manifests, count, alone.manifests)
			}
			if most := alone.requests + count - 1; many.requests > most {
				t.Errorf("%d requests for %d sandboxes, want at most %d: those of one (%d), and one for each further", many.requests, count, most, alone.requests)
			}
		})
	}
}

// cost is what a registry was asked for and sent.
type cost struct {
	requests  int   // of any kind
	manifests int   // requests of manifests that count as a pull: HEAD does not
	bytes     int64 // of layers
}

// measure runs sandboxes on a fresh node over a registry of their own. Of a layer that
// can be read lazily the first request is for the table of contents at its end: it asks
// for some bytes before that, too, as nobody knows its size, and they are not kept.
func measure(t *testing.T, a *application, lazy bool, count int) cost {
	t.Helper()
	reg := registrytest.Start(t, registrytest.Options{})
	pushed := reg.PushImage("app", "v1", a.image)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	n, err := startNode(ctx, reg.Host())
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.sandboxes(ctx, count, reg.Host()+"/app:v1", a, nil)
	if err := n.close(); err != nil {
		t.Error(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := cost{requests: reg.Total().Requests}
	for _, r := range reg.Requests("/manifests/") {
		if r.Method == http.MethodGet {
			c.manifests++
		}
	}
	for _, l := range pushed.Layers {
		c.bytes += reg.BlobStats(l.Digest).Bytes
		requests := reg.Requests(l.Digest.String())
		if lazy {
			requests = requests[1:]
		}
		if err := registrytest.Once(requests, l.Size); err != nil {
			t.Error(err)
		}
	}
	return c
}
