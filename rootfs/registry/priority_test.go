package registry_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// A request says that nobody waits for it, and nothing else of whom it is for.
func TestPriority(t *testing.T) {
	data := random(1000)
	said := make(chan []string, 10)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		said <- req.Header.Values("Priority")
		w.Header().Set("Content-Range", "bytes 0-999/1000")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(data) // the client has what it has
	}))
	defer srv.Close()
	name, err := reference.ParseNormalizedNamed("docker.io/library/x")
	if err != nil {
		t.Fatal(err)
	}
	repo := newClient(t, fast()).Mirror(strings.TrimPrefix(srv.URL, "http://"), name)
	work := sched.NewWork(sched.Standing{Rank: sched.Background})
	promoted := sched.NewWork(sched.Standing{Rank: sched.Background})
	promoted.Promote(sched.Standing{})
	for _, tc := range []struct {
		name string
		ctx  context.Context
		want string
	}{
		{"nothing", t.Context(), ""},
		{"demand", sched.WithRank(t.Context(), sched.Demand), ""},
		{"prefetch", sched.WithRank(t.Context(), sched.Prefetch), "u=5"},
		{"background", sched.WithRank(t.Context(), sched.Background), "u=7"},
		{"work", sched.With(t.Context(), work), "u=7"},
		{"promoted work", sched.With(t.Context(), promoted), ""},
		{"demand for what is less", sched.With(sched.WithRank(t.Context(), sched.Prefetch), promoted), "u=5"},
	} {
		rc, err := repo.SegmentRange(tc.ctx, digest.FromBytes(data), 0, 1000)
		if got, err := readAll(t, rc, err); err != nil || len(got) != len(data) {
			t.Fatalf("%s: %d bytes, %v", tc.name, len(got), err)
		}
		if got := strings.Join(<-said, "|"); got != tc.want {
			t.Errorf("%s: Priority %q, want %q", tc.name, got, tc.want)
		}
	}
}

// A redirect to what can be no host is refused before it is remembered.
func TestLongHost(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		http.Redirect(w, req, "http://"+strings.Repeat("a", 1<<16)+".example/x", http.StatusTemporaryRedirect)
	}))
	defer srv.Close()
	name, err := reference.ParseNormalizedNamed("docker.io/library/x")
	if err != nil {
		t.Fatal(err)
	}
	client := newClient(t, fast())
	if _, err := client.Mirror(strings.TrimPrefix(srv.URL, "http://"), name).SegmentRange(t.Context(), digest.FromString("x"), 0, 1); err == nil {
		t.Error("it is taken for one")
	}
	for _, h := range client.Stats().Hosts {
		if len(h.Host) > 1000 {
			t.Errorf("a host of %d bytes is remembered", len(h.Host))
		}
	}
}
