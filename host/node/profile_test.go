package node

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/profile"
	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/pathlist"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// patience bounds what a test waits for.
const patience = 30 * time.Second

// appLayers are two layers that can be read lazily, with many files. Packing them takes
// seconds under the race detector.
var appLayers = sync.OnceValue(func() []registrytest.Layer {
	var out []registrytest.Layer
	for k, dir := range []string{"usr/lib", "app"} {
		var entries []registrytest.Entry
		for i := range 100 {
			entries = append(entries, registrytest.File(fmt.Sprintf("%s/%02d", dir, i), 0o644, text(byte(100*k+i), 100_000)))
		}
		out = append(out, registrytest.Must(registrytest.EStargz(registrytest.Must(registrytest.Tar(entries...)), estargz.WithCompressionLevel(gzip.BestSpeed))))
	}
	return out
})

// newApp pushes an image and says which of its files its starts read, in which order.
func newApp(t *testing.T, g *rig) (pushed registrytest.Pushed, start []string) {
	t.Helper()
	for i := range 12 { // here and there
		start = append(start, fmt.Sprintf("usr/lib/%02d", i*37%100), fmt.Sprintf("app/%02d", i*61%100))
	}
	return g.push("app:v1", appLayers()...), start
}

// run reads what a start reads, as a guest without a store does, and returns how often
// it had to wait, and the ranges of the image.
func (g *rig) run(t *testing.T, l *Lease, paths []string) (misses int64, ranges []index.Range) {
	t.Helper()
	files, err := g.tree(l.record)
	if err != nil {
		t.Fatal(err)
	}
	found, unknown := files.Find(paths)
	if unknown > 0 {
		t.Fatalf("%d of %q are not in the image", unknown, paths)
	}
	before := g.Stats().Store.Misses
	ranges = placed(l.Segments(), found)
	for _, r := range ranges {
		for off, end := r.Off, r.Off+r.Len; off < end; off += 16 << 10 {
			if _, err := l.ReadAt(t.Context(), make([]byte, min(16<<10, end-off)), off); err != nil {
				t.Fatal(err)
			}
		}
	}
	return g.Stats().Store.Misses - before, ranges
}

// replayed waits until nothing is replayed any more.
func (g *rig) replayed(t *testing.T) {
	t.Helper()
	g.await(t, "the end of replays", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.replays) == 0
	})
}

func (g *rig) await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s; log:\n%s", what, g.log)
		}
	}
}

// another is a second node with the same registry.
func (g *rig) another(t *testing.T) *rig {
	t.Helper()
	o := &rig{reg: g.reg, root: t.TempDir()}
	o.open(t)
	return o
}

// cold prepares the image on a node that has nothing and knows nothing, and runs it.
func (g *rig) cold(t *testing.T, start []string) (o *rig, l *Lease, misses int64, ranges []index.Range) {
	t.Helper()
	o = g.another(t)
	o.prepare(t, "app:v1")
	o.replayed(t)
	l = o.lease(t, "app:v1")
	misses, ranges = o.run(t, l, start)
	return o, l, misses, ranges
}

func lessThanTenth(t *testing.T, what string, misses, before int64) {
	t.Helper()
	t.Logf("%s: %d misses, %d without", what, misses, before)
	if before < 10 || misses*10 > before {
		t.Errorf("%s: %d misses, want at most a tenth of %d", what, misses, before)
	}
}

// A node whose store has lost the bytes of an image has them again before a start asks.
func TestReplay(t *testing.T) {
	g := newRig(t)
	_, start := newApp(t, g)
	g.prepare(t, "app:v1")
	g.replayed(t)
	l := g.lease(t, "app:v1")
	before, ranges := g.run(t, l, start)
	args := []string{"/app", "serve"}
	if err := l.RecordStart(args, ranges, false); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g.loseSegments(t)
	g.open(t)
	g.prepare(t, "app:v1")
	g.replayed(t)
	l = g.lease(t, "app:v1")
	after, _ := g.run(t, l, start)
	lessThanTenth(t, "the same node", after, before)
	for _, words := range [][]string{nil, args, {"another"}} {
		if got := sum(l.Profile(words)); got < sum(ranges) {
			t.Errorf("a guest is told of %d bytes for %q, a start read %d", got, words, sum(ranges))
		}
	}
	if all := g.Profiles(); len(all) != 2 || all[0].Reference != g.ref("app:v1") || all[1].Command != "/app" || all[1].Runs != 1 {
		t.Errorf("profiles %+v", all)
	}
	l.Close()
	if err := g.Remove(l.Manifest()); err != nil || len(g.Profiles()) > 0 {
		t.Errorf("%v; profiles %v", err, g.Profiles())
	}
	if err := l.RecordStart(args, ranges, false); !errdefs.IsNotFound(err) {
		t.Errorf("a start of an image that is gone: %v", err)
	}
	if left := g.list(t, "images"); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func sum(ranges []index.Range) int64 {
	n := int64(0)
	for _, r := range ranges {
		n += r.Len
	}
	return n
}

// Another node that gets a list of paths, or finds the profile beside the image, has
// what a start reads when it reads it.
func TestShareProfile(t *testing.T) {
	g := newRig(t)
	_, start := newApp(t, g)
	a, l, before, ranges := g.cold(t, start)
	if err := l.RecordStart(nil, ranges, false); err != nil {
		t.Fatal(err)
	}
	list, err := l.ExportProfile("")
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Split(strings.TrimSpace(string(list)), "\n"); len(got) < len(start) || got[0] != "/"+start[0] {
		t.Errorf("%d paths, the first is %q", len(got), got[0])
	}
	t.Run("list", func(t *testing.T) {
		b, l, _, _ := g.cold(t, nil)
		paths, err := pathlist.Read(bytes.NewReader(list))
		if err != nil {
			t.Fatal(err)
		}
		done, err := l.ImportProfile(append(paths, "none"))
		if err != nil || done.Known != len(paths) || done.Unknown != 1 || done.Bytes == 0 {
			t.Errorf("%+v, %v", done, err)
		}
		b.replayed(t)
		misses, _ := b.run(t, l, start)
		lessThanTenth(t, "an imported list", misses, before)
		if _, err := l.ImportProfile([]string{"none"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a list of nothing: %v", err)
		}
	})
	t.Run("published", func(t *testing.T) {
		if _, err := l.PushProfile(t.Context()); err != nil {
			t.Fatal(err)
		}
		b, _, misses, _ := g.cold(t, start)
		lessThanTenth(t, "a published profile", misses, before)
		if all := b.Profiles(); len(all) != 1 || all[0].Source != profile.Registry || all[0].Command != "" {
			t.Errorf("profiles %+v", all)
		}
		if all := a.Profiles(); len(all) != 1 || all[0].Source != profile.Recorded {
			t.Errorf("profiles of the publisher %+v", all)
		}
	})
}

// Ranges of layers that were cut otherwise say nothing; the paths beside them do.
func TestOtherLayout(t *testing.T) {
	g := newRig(t)
	pushed, start := newApp(t, g)
	_, _, before, _ := g.cold(t, start)
	other := &profile.Profile{Source: profile.Registry, Runs: 5}
	other.Add([]profile.Range{{Segment: digest.FromString("another cut"), Off: 0, Len: 1 << 16}}, 1<<30, false)
	g.publish(t, pushed.Desc, other, pathlist.Write(start))
	b, _, misses, _ := g.cold(t, start)
	lessThanTenth(t, "paths", misses, before)
	if all := b.Profiles(); len(all) != 1 || all[0].Source != profile.Registry || all[0].Parts[0].Segment == other.Parts[0].Segment {
		t.Errorf("profiles %+v", all)
	}
}

// A published profile is bounded like any other.
func TestLargePublished(t *testing.T) {
	g := newRig(t)
	pushed, _ := newApp(t, g)
	_, l, _, _ := g.cold(t, nil)
	whole := []index.Range{{Off: 0, Len: l.Size()}}
	all := &profile.Profile{Source: profile.Registry}
	all.Add(chunks(l.Segments(), whole, math.MaxInt64), math.MaxInt64, false)
	g.publish(t, pushed.Desc, all, nil)
	o, _, _, _ := g.cold(t, nil)
	if n, limit := o.Stats().ReplayedBytes, profile.MaxBytes(l.Size()); n == 0 || n > limit+limit/8 || profile.Bytes(all.Replay()) <= limit+limit/8 {
		t.Errorf("replayed %d bytes of %d that somebody has published; the bound is %d", n, profile.Bytes(all.Replay()), limit)
	}
}

// publish pushes a profile that somebody made.
func (g *rig) publish(t *testing.T, subject ocispec.Descriptor, p *profile.Profile, paths []byte) {
	t.Helper()
	data := registrytest.Must(profile.Encode(p))
	g.publishRaw(t, subject, data, paths)
}

func (g *rig) publishRaw(t *testing.T, subject ocispec.Descriptor, ranges, paths []byte) {
	t.Helper()
	r, p := artifact.Describe(profile.RangesType, ranges), artifact.Describe(profile.PathsType, paths)
	_, manifest, err := profile.Artifact(subject, r, p)
	if err != nil {
		t.Fatal(err)
	}
	g.reg.PushBlob("library/app", "", ranges)
	g.reg.PushBlob("library/app", "", paths)
	g.reg.PushBlob("library/app", "", ocispec.DescriptorEmptyJSON.Data)
	g.reg.PushManifest("library/app", "", ocispec.MediaTypeImageManifest, manifest)
}

// What is published wrongly, or not at all, does not keep an image from being pulled.
func TestBadPublished(t *testing.T) {
	for name, publish := range map[string]func(t *testing.T, g *rig, subject ocispec.Descriptor){
		"damaged": func(t *testing.T, g *rig, subject ocispec.Descriptor) {
			t.Helper()
			g.publishRaw(t, subject, []byte("{"), []byte("a\n"))
		},
		"paths out of the image": func(t *testing.T, g *rig, subject ocispec.Descriptor) {
			t.Helper()
			g.publish(t, subject, &profile.Profile{Source: profile.Registry}, []byte("../../etc/passwd\n"))
		},
		"nothing known": func(t *testing.T, g *rig, subject ocispec.Descriptor) {
			t.Helper()
			g.publish(t, subject, &profile.Profile{Source: profile.Registry}, []byte("none\n"))
		},
		"a registry that fails": func(t *testing.T, g *rig, _ ocispec.Descriptor) {
			t.Helper()
			g.reg.Fault("artifactType="+strings.ReplaceAll(profile.ArtifactType, "/", "%2F"), -1, registrytest.Status(500))
		},
	} {
		g := newRig(t)
		pushed, start := newApp(t, g)
		publish(t, g, pushed.Desc)
		b, _, misses, _ := g.cold(t, start)
		if misses < 10 || len(b.Profiles()) > 0 {
			t.Errorf("%s: %d misses, profiles %+v", name, misses, b.Profiles())
		}
	}
}

// A damaged file is none; the next start makes a new one.
func TestDamagedProfile(t *testing.T) {
	g := newRig(t)
	_, start := newApp(t, g)
	g.prepare(t, "app:v1")
	l := g.lease(t, "app:v1")
	_, ranges := g.run(t, l, start)
	other := registrytest.Must(profile.Encode(&profile.Profile{Source: profile.Recorded, Entrypoint: profile.Key([]string{"x"})}))
	for name, data := range map[string][]byte{
		"empty": nil, "noise": []byte("noise"), "of another command": other, "long": make([]byte, profile.MaxEncoded+1),
	} {
		if err := os.WriteFile(g.profilePath(l.Manifest(), ""), data, 0o600); err != nil {
			t.Fatal(err)
		}
		g.log.Reset()
		if p := l.Profile(nil); len(p) > 0 || len(g.Profiles()) > 0 || !strings.Contains(g.log.String(), "cannot be read") {
			t.Errorf("%s: %v; log %s", name, p, g.log)
		}
		g.prepare(t, "app:v1") // is not in the way
		g.replayed(t)
		if err := l.RecordStart(nil, ranges, false); err != nil || len(g.Profiles()) != 1 {
			t.Errorf("%s: %v, then %v", name, err, g.Profiles())
		}
	}
	l.Close()
	g.restart(t)
	if len(g.Profiles()) != 1 {
		t.Errorf("after a restart: %v", g.Profiles())
	}
}

// Whatever ranges a guest reports, a profile has only chunks of its image, each once,
// within bounds.
func TestHostileRecord(t *testing.T) {
	g := newRig(t)
	_, _ = newApp(t, g)
	g.prepare(t, "app:v1")
	l := g.lease(t, "app:v1")
	huge := index.Range{Off: 0, Len: math.MaxInt64}
	for name, ranges := range map[string][]index.Range{
		"nothing":  nil,
		"negative": {{Off: -5, Len: 10}, {Off: 5, Len: -10}, {Off: math.MinInt64, Len: math.MinInt64}},
		"outside":  {{Off: l.Size(), Len: 1 << 20}, {Off: math.MaxInt64, Len: math.MaxInt64}, {Off: math.MaxInt64 - 1, Len: 5}},
		"boot":     {{Off: 0, Len: 1}},
		"all":      slices.Repeat([]index.Range{huge}, 5000),
	} {
		g.RemoveProfiles(l.Manifest())
		if err := l.RecordStart([]string{"x"}, ranges, false); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, p := range g.Profiles() {
			seen := map[profile.Range]bool{}
			for _, r := range p.Replay() {
				if seen[r] || !isChunk(l.Segments(), r) {
					t.Errorf("%s: %v", name, r)
				}
				seen[r] = true
			}
			if n := profile.Bytes(p.Replay()); n > profile.MaxBytes(l.Size()) {
				t.Errorf("%s: %d bytes", name, n)
			}
		}
		if n := len(g.Profiles()); (n > 0) != (name == "all") {
			t.Errorf("%s: %d profiles", name, n)
		}
	}
	for i := range 3 * maxProfiles {
		if err := l.RecordStart([]string{fmt.Sprint(i)}, []index.Range{huge}, false); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(g.Profiles()); n > maxProfiles+1 {
		t.Errorf("%d profiles of one image", n)
	}
}

// What is mounted on the node is recorded there, until it is said to be ready.
func TestRecordFile(t *testing.T) {
	g := newRig(t)
	g.profiles = Profiles{Record: time.Hour}
	g.restart(t)
	_, start := newApp(t, g)
	g.prepare(t, "app:v1")
	l := g.lease(t, "app:v1")
	f := g.lease(t, "app:v1").File()
	f.Begin(false)
	want := placed(l.Segments(), g.chunksOf(t, l, start[:5]))
	for _, r := range want {
		if _, err := f.ReadAt(t.Context(), make([]byte, r.Len), r.Off); err != nil {
			t.Fatal(err)
		}
	}
	g.EndRecordings(l.Manifest())
	g.await(t, "profile", func() bool { return len(g.Profiles()) == 1 })
	_, _ = g.run(t, l, start[5:]) // no part of the start
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	p := g.Profiles()[0]
	if got := placed(l.Segments(), p.Replay()); !slices.Equal(got, want) {
		t.Errorf("recorded %v, want %v", got, want)
	}
}

// A device may open an image as often as it likes: a lease has one recording.
func TestRecordOnce(t *testing.T) {
	g := newRig(t)
	g.cfg.Profiles.Record = time.Hour
	_, _ = newApp(t, g)
	if _, err := g.Prepare(t.Context(), g.ref("app:v1"), ""); err != nil {
		t.Fatal(err)
	}
	l, err := g.Lease(t.Context(), g.ref("app:v1"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 100 {
		l.Record(nil, true)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if n := len(g.recordings[l.Manifest()]); n != 1 {
		t.Errorf("%d recordings of one lease", n)
	}
}

func (g *rig) chunksOf(t *testing.T, l *Lease, paths []string) []profile.Range {
	t.Helper()
	found, _, err := g.find(l.record, l.Segments(), paths)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// What a replay fetches counts for the class of the pull, and comes after what somebody
// waits for.
func TestReplayStanding(t *testing.T) {
	turns, err := sched.New(sched.Config{Default: "online", Classes: []sched.Class{{Name: "online", Share: 95}, {Name: "batch", Share: 5}}})
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t)
	_, start := newApp(t, g)
	_, l, _, ranges := g.cold(t, start)
	if err := l.RecordStart(nil, ranges, false); err != nil {
		t.Fatal(err)
	}
	if _, err := l.PushProfile(t.Context()); err != nil {
		t.Fatal(err)
	}
	o := &rig{reg: g.reg, root: t.TempDir(), turns: turns}
	o.open(t)
	pull := sched.NewWork(sched.Standing{Flow: turns.Flow("batch", "pod"), Rank: sched.Demand})
	if _, err := o.Prepare(sched.With(t.Context(), pull), g.ref("app:v1"), ""); err != nil {
		t.Fatal(err)
	}
	o.replayed(t)
	got := map[string]int64{}
	for _, q := range turns.Status().Queues {
		for _, c := range q.Classes {
			if q.Name == g.reg.Host() {
				got[c.Class] = c.Total
			}
		}
	}
	if want := g.reg.Total(); got["batch"] == 0 || got["online"] > 0 || o.Stats().ReplayedBytes < sum(ranges) {
		t.Errorf("bytes by class %v, replayed %d of %d; the registry sent %+v", got, o.Stats().ReplayedBytes, sum(ranges), want)
	}
}

// Several starts are published once, where the settings say so.
func TestPublishAfter(t *testing.T) {
	g := newRig(t)
	g.profiles = Profiles{Record: time.Hour, Push: true}
	g.restart(t)
	pushed, start := newApp(t, g)
	g.prepare(t, "app:v1")
	g.replayed(t)
	l := g.lease(t, "app:v1")
	_, ranges := g.run(t, l, start)
	for run := range 2 * publishedAfter {
		if err := l.RecordStart(nil, ranges, false); err != nil {
			t.Fatal(err)
		}
		if run+1 >= publishedAfter {
			g.await(t, "published profile", func() bool { return g.published(t, pushed) == 1 })
		} else if n := g.published(t, pushed); n > 0 {
			t.Errorf("published after %d starts", run+1)
		}
	}
	if err := g.Close(); err != nil { // waits for what is under way
		t.Fatal(err)
	}
	if n := g.published(t, pushed); n != 1 {
		t.Errorf("%d profiles are published", n)
	}
	g.open(t)
}

func (g *rig) published(t *testing.T, p registrytest.Pushed) int {
	t.Helper()
	ref, err := image.ParseReference(g.ref("app:v1"))
	if err != nil {
		t.Fatal(err)
	}
	refs, err := g.client.Repository(ref).Referrers(t.Context(), p.Desc.Digest, profile.ArtifactType)
	if err != nil {
		t.Fatal(err)
	}
	return len(refs)
}

// The rest of an image follows its start, where there is room.
func TestFillAfterStart(t *testing.T) {
	for _, room := range []bool{true, false} {
		g := newRig(t)
		g.profiles = Profiles{Record: time.Millisecond}
		if !room {
			g.quota = 4 << 20
		}
		g.restart(t)
		newApp(t, g)
		g.prepare(t, "app:v1")
		l := g.lease(t, "app:v1")
		l.FillAfterStart()
		if room {
			g.await(t, "complete image", l.open.Complete)
			continue
		}
		g.background.Wait()
		if l.open.Present() > l.Size()/2 || g.Space().Evicted > 0 {
			t.Errorf("%d of %d bytes were fetched where there is no room; %+v", l.open.Present(), l.Size(), g.Space())
		}
	}
}

// A lease that ends takes its fill along.
func TestFillEnds(t *testing.T) {
	g := newRig(t)
	g.profiles = Profiles{Record: time.Hour}
	g.restart(t)
	newApp(t, g)
	g.prepare(t, "app:v1")
	g.replayed(t)
	l := g.lease(t, "app:v1")
	l.FillAfterStart()
	l.Close()
	g.background.Wait() // not an hour
	if files, err := filepath.Glob(filepath.Join(g.root, "images", "*", "*", "profile-*")); err != nil || len(files) > 0 {
		t.Errorf("%v, %v", files, err)
	}
}

// A replay that is under way for a job is for the pod that asks for it, too.
func TestReplayIsPromoted(t *testing.T) {
	turns := newSched(t, sched.Config{})
	g := newRig(t)
	newApp(t, g)
	g.prepare(t, "app:v1")
	g.replayed(t)
	l := g.lease(t, "app:v1")
	job := &replay{key: replayKey{manifest: l.Manifest()}, work: sched.NewWork(sched.Standing{Flow: turns.Flow("batch", "job"), Rank: sched.Prefetch})}
	if g.beginReplay(job) != job {
		t.Fatal("there is a replay already")
	}
	defer g.endReplay(job)
	job.cancel = func() {}
	job.use(l.open)
	pod := turns.Flow("online", "pod")
	g.startReplay(&replay{key: job.key, flow: pod})
	if got := job.work.Standing().Flow; got != pod {
		t.Errorf("it is for %s", got.ID())
	}
	if got := l.Flow(); got != pod {
		t.Errorf("it fetches for %s", got.ID())
	}
	g.startReplay(&replay{key: job.key, flow: turns.Flow("batch", "another job")})
	if got := l.Flow(); got != pod {
		t.Errorf("it fetches for %s, which is less important", got.ID())
	}
}

// When the container that has an image filled ends, the fill goes on for another one.
func TestFillIsHandedOver(t *testing.T) {
	g := newRig(t)
	newApp(t, g)
	g.prepare(t, "app:v1")
	g.replayed(t)
	first, second := g.lease(t, "app:v1"), g.lease(t, "app:v1")
	if g.beginFill(first) != nil {
		t.Fatal("it is filled already")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		second.fill(t.Context())
	}()
	select {
	case <-done:
		t.Error("nobody fills it when the first one ends")
	case <-time.After(50 * time.Millisecond):
	}
	g.endFill(first)
	<-done
	if !second.open.Complete() {
		t.Error("nobody has filled it")
	}
}
