package faults

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// The registries of these tests want a token; this is how to get one.
const (
	user     = "robot"
	password = "open sesame"
)

// bad is a registry that fails, and the two kinds of guests that read from it.
type bad struct {
	reg    *registrytest.Server
	guests map[string]*guest
	all    []*registrytest.Server
}

// newBad starts it all with n registries, as what one of them refuses is a pause for
// all who ask it; args are flags of both guests.
func newBad(t *testing.T, n int, opts registrytest.Options, args ...string) *bad {
	t.Helper()
	need(t)
	b := &bad{}
	var auths []string
	for range n {
		reg := registrytest.Start(t, opts)
		b.all = append(b.all, reg)
		auths = append(auths, fmt.Sprintf(`%q:{"username":%q,"password":%q}`, reg.Host(), user, password))
	}
	b.reg = b.all[0]
	dir := t.TempDir()
	config := filepath.Join(dir, "config.json")
	check(t, os.WriteFile(config, fmt.Appendf(nil, `{"auths":{%s}}`, strings.Join(auths, ",")), 0o600))
	h := startHost(t, relayed("[registry]", quoted("credentials", config)))
	b.guests = map[string]*guest{
		"relay":  h.attached(t, args...),
		"direct": direct(t, []string{"DOCKER_CONFIG=" + dir}, nil, args...),
	}
	return b
}

// at is the same with registry n.
func (b *bad) at(n int) *bad { return &bad{reg: b.all[n], guests: b.guests} }

// each runs a test with each guest and an image of its own, at the same time.
func (b *bad) each(t *testing.T, repo string, f func(t *testing.T, g *guest, repo, root string, i image)) {
	for kind, g := range b.guests {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			repo := repo + "-" + kind
			i := push(b.reg, repo)
			root := g.mustPull(t, repo, b.reg.Host()+"/"+repo+":v1")
			check(t, i.read(t, root, 0, 1))
			f(t, g, repo, root, i)
		})
	}
}

// spoil spoils the next count answers to requests for blobs of a repository, all
// of them when count is 0, and tells how many it has.
func (b *bad) spoil(repo string, count int, effects ...registrytest.Effect) (spoiled *atomic.Int64, end func()) {
	spoiled = new(atomic.Int64)
	end = b.reg.FaultFunc(func(r *http.Request) bool {
		hit := strings.HasPrefix(r.URL.Path, "/v2/"+repo+"/blobs/") || strings.HasPrefix(r.URL.Path, "/storage/"+repo+"/")
		if hit {
			spoiled.Add(1)
		}
		return hit
	}, count, effects...)
	return spoiled, end
}

// storm is how many answers in a row a fault spoils that passes: more than the
// tries of one request.
const storm = 8

// passing are the faults that pass.
var passing = []struct {
	name    string
	count   int
	effects []registrytest.Effect
}{
	{name: "401", count: storm, effects: []registrytest.Effect{registrytest.Status(401)}},
	{name: "403", count: storm, effects: []registrytest.Effect{registrytest.Status(403)}},
	{name: "408", count: storm, effects: []registrytest.Effect{registrytest.Status(408)}},
	{name: "429", count: 3 * storm, effects: []registrytest.Effect{registrytest.Status(429)}},
	{name: "429 with a pause", count: storm, effects: []registrytest.Effect{registrytest.Status(429, "Retry-After", "1")}},
	{name: "429 with a long pause", count: 2, effects: []registrytest.Effect{registrytest.Status(429, "Retry-After", "3600")}},
	{name: "500", count: storm, effects: []registrytest.Effect{registrytest.Status(500)}},
	{name: "502", count: storm, effects: []registrytest.Effect{registrytest.Status(502)}},
	{name: "503", count: storm, effects: []registrytest.Effect{registrytest.Status(503)}},
	{name: "504", count: storm, effects: []registrytest.Effect{registrytest.Status(504)}},
	{name: "no answer", count: storm, effects: []registrytest.Effect{registrytest.Truncate(0)}},
	{name: "broken off", count: storm, effects: []registrytest.Effect{registrytest.Truncate(100_000)}},
	{name: "reset", count: storm, effects: []registrytest.Effect{registrytest.Reset(100_000)}},
	{name: "short", count: storm, effects: []registrytest.Effect{registrytest.Short(1)}},
	{name: "extra", count: storm, effects: []registrytest.Effect{registrytest.Extra(1000)}},
	{name: "wrong bytes", count: 2, effects: []registrytest.Effect{registrytest.Corrupt(everywhere()...)}},
	{name: "another range", count: storm, effects: []registrytest.Effect{registrytest.ShiftRange(1)}},
	{name: "no range", count: storm, effects: []registrytest.Effect{registrytest.NoRange()}},
	{name: "no length", count: storm, effects: []registrytest.Effect{registrytest.Chunked()}},
	{name: "redirect loop", count: storm, effects: []registrytest.Effect{registrytest.Loop()}},
	{name: "slow", count: 2, effects: []registrytest.Effect{registrytest.Slow(1 << 20)}},
	{name: "late", count: storm, effects: []registrytest.Effect{registrytest.Delay(time.Second)}},
	{name: "stall", count: 1, effects: []registrytest.Effect{registrytest.Stall(100_000, registrytest.Forever)}},
	{name: "no header", count: 1, effects: []registrytest.Effect{registrytest.Delay(registrytest.Forever)}},
}

// everywhere is a byte in every 10,000 of an image.
func everywhere() (at []int64) {
	for off := int64(1000); off < files*fileSize; off += 10_000 {
		at = append(at, off)
	}
	return at
}

// TestPassing reads through each fault that passes: no read fails.
func TestPassing(t *testing.T) {
	t.Parallel()
	all := newBad(t, len(passing), registrytest.Options{Auth: &registrytest.Auth{User: user, Password: password}})
	for n, f := range passing {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			b := all.at(n)
			b.each(t, fmt.Sprintf("passing%d", n), func(t *testing.T, g *guest, repo, root string, i image) {
				spoiled, end := b.spoil(repo, f.count, f.effects...)
				defer end()
				began := time.Now()
				if err := i.read(t, root, 1, files); err != nil {
					t.Error(err)
				}
				if spoiled.Load() == 0 {
					t.Error("no answer was spoiled")
				}
				t.Logf("%d answers spoiled, read in %s", spoiled.Load(), time.Since(began))
			})
		})
	}
}

// TestTokens has tokens end over and over while they are used.
func TestTokens(t *testing.T) {
	t.Parallel()
	b := newBad(t, 1, registrytest.Options{Auth: &registrytest.Auth{User: user, Password: password, TTL: 500 * time.Millisecond}})
	b.each(t, "tokens", func(t *testing.T, _ *guest, repo, root string, i image) {
		spoiled, end := b.spoil(repo, 0, registrytest.Slow(1<<20), registrytest.Truncate(300_000))
		defer end()
		before := b.reg.Tokens()
		if err := i.read(t, root, 1, files); err != nil {
			t.Error(err)
		}
		if tokens := b.reg.Tokens() - before; tokens < 2 || spoiled.Load() < 2 {
			t.Errorf("%d tokens were fetched for %d answers", tokens, spoiled.Load())
		}
	})
}

// TestRedirects reads from a registry that sends readers on, by URLs that have ended
// when the image is read, to storage that fails, too.
func TestRedirects(t *testing.T) {
	t.Parallel()
	const life = 2 * time.Second
	b := newBad(t, 1, registrytest.Options{Redirect: true, RedirectTTL: life})
	for n, effect := range []registrytest.Effect{
		registrytest.Status(403), registrytest.Status(503), registrytest.Reset(100_000), registrytest.Loop(), registrytest.Slow(8 << 20),
	} {
		b.each(t, fmt.Sprintf("redirects%d", n), func(t *testing.T, _ *guest, repo, root string, i image) {
			var sent atomic.Int64
			end := b.reg.FaultFunc(func(r *http.Request) bool {
				hit := strings.HasPrefix(r.URL.Path, "/storage/"+repo+"/")
				if hit {
					sent.Add(1)
				}
				return hit
			}, storm, effect)
			defer end()
			time.Sleep(life)
			if err := i.read(t, root, 1, files); err != nil {
				t.Error(err)
			}
			if sent.Load() == 0 {
				t.Error("no answer of the storage was spoiled")
			}
		})
	}
}

// lasting are faults that no retry saves.
var lasting = []struct {
	name   string
	effect registrytest.Effect
	says   []string // in the log of whom asks the registry
}{
	{"401", registrytest.Status(401), []string{"were the right credentials given"}},
	{"403", registrytest.Status(403), []string{"allow to pull this repository?"}},
	{"404", registrytest.Status(404), []string{"was it pushed to this registry?"}},
	{"429", registrytest.Status(429), []string{"the registry limits requests: log in, wait, or use a mirror"}},
	{"429 with a long pause", registrytest.Status(429, "Retry-After", "3600"), []string{"come back after 1h0m0s"}},
	{"503", registrytest.Status(503), []string{"HTTP status 503"}},
	{"no answer", registrytest.Truncate(0), []string{"EOF"}},
	{"reset", registrytest.Reset(1000), []string{"connection reset by peer"}},
	{"wrong bytes", registrytest.Corrupt(everywhere()...), []string{"data loss"}},
	{"redirect loop", registrytest.Loop(), []string{"more than 10 redirects"}},
}

// TestLasting reads while a fault stays: past the guest's patience reads fail, the
// log says of what and what to do, and when the fault is over they go on.
func TestLasting(t *testing.T) {
	t.Parallel()
	all := newBad(t, len(lasting), registrytest.Options{Auth: &registrytest.Auth{User: user, Password: password}}, "--patience", "1s")
	for n, f := range lasting {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			b := all.at(n)
			b.each(t, fmt.Sprintf("lasting%d", n), func(t *testing.T, g *guest, repo, root string, i image) {
				spoiled, end := b.spoil(repo, 0, f.effect)
				err := i.sum(t.Context(), root, files-1)
				if err == nil || !strings.Contains(err.Error(), "Input/output error") {
					t.Errorf("read with the fault: %v, %d answers spoiled", err, spoiled.Load())
				}
				asker := g.program
				if g.host != nil {
					asker = g.host.program
				}
				for _, want := range append(f.says, b.reg.Host()) {
					if !logged(asker.log(), repo, want) {
						t.Errorf("no line of %s about %s says %q", asker.name, repo, want)
					}
				}
				if !logged(g.log(), repo, "the reader gets EIO and may try again") {
					t.Errorf("the guest does not tell of a read of %s that failed", repo)
				}
				end()
				eventually(t, "reads go on after the fault, and the pause that it asked for", func() bool {
					err := i.read(t, root, 0, files)
					if err != nil {
						t.Log(err)
					}
					return err == nil
				})
			})
		})
	}
}

// logged says whether a line of a log that is not for debugging has both words.
func logged(log, word, other string) bool {
	for line := range strings.Lines(log) {
		if !strings.Contains(line, "DEBUG") && strings.Contains(line, word) && strings.Contains(line, other) {
			return true
		}
	}
	return false
}
