package isolation

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/link"
)

// tree is an image of directories of small files. A layer has the files of a directory
// one after the other, but not sorted, as a file system lists them.
type tree struct {
	dirs, files int // files in a directory
	size        int // of files in the mean, bytes
}

// treeOf is a tree with so many bytes, roughly.
func treeOf(total int64) tree {
	t := tree{files: 100, size: 24 << 10}
	t.dirs = max(1, int(total)/(t.files*t.size))
	return t
}

// layer makes the tree's layer, and returns the names in the order of the layer.
func (t tree) layer(tb testing.TB, pack func([]byte) (registrytest.Layer, error)) (l registrytest.Layer, names []string) {
	tb.Helper()
	src, r := rand.NewChaCha8([32]byte{10}), rand.New(rand.NewPCG(10, 10))
	var entries []registrytest.Entry
	for d := range t.dirs {
		dir := fmt.Sprintf("tree/%04d", d)
		entries = append(entries, registrytest.Dir(dir, 0o755))
		for _, f := range r.Perm(t.files) {
			b := make([]byte, 1+r.IntN(2*t.size))
			content{packs: true}.fill(src, b)
			name := fmt.Sprintf("%s/%03d", dir, f)
			entries = append(entries, registrytest.Entry{Header: registrytest.File(name, 0o644, "").Header, Body: b})
			names = append(names, name)
		}
	}
	tar, err := registrytest.Tar(entries...)
	check(tb, err)
	l, err = pack(tar)
	check(tb, err)
	return l, names
}

// orders in which a program may read all files.
var orders = []struct {
	name string
	of   func(names []string)
}{
	{"in the order of directories", slices.Sort[[]string]},
	{"in random order", func(names []string) {
		rand.New(rand.NewPCG(11, 11)).Shuffle(len(names), func(a, b int) { names[a], names[b] = names[b], names[a] })
	}},
}

// newPuller starts a sandbox that has no node: it pulls images from the registry.
func (s *site) newPuller(tb testing.TB) *sandbox {
	tb.Helper()
	dir := newDir(tb)
	b := &sandbox{id: filepath.Base(dir), node: &node{}}
	b.program = start(tb, "tatami-guest", dir, nil, "--host-address", "", "--relay-address", "", "--plain-http", s.address,
		"--log-level", "warn", "--listen", "unix:DIR/guest", "--stream-listen", "unix:DIR/streams", "--cdh-socket", "DIR/cdh", "--state-dir", "DIR/state")
	tb.Cleanup(b.close)
	var err error
	b.client, err = b.dial(tb.Context(), "guest")
	check(tb, err)
	b.guest = api.NewGuestClient(b.client)
	return b
}

// pullAll downloads and unpacks an image in the sandbox, and mounts it.
func (b *sandbox) pullAll(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	b.root = b.path("rootfs")
	_, err := b.guest.Mount(ctx, &api.MountRequest{Id: b.id, Reference: ref, Target: b.root, ReadOnly: true, Mode: api.Mode_MODE_FULL})
	return errgrpc.ToNative(err)
}

// fetched is how many bytes of images the sandbox got from its node.
func (b *sandbox) fetched(tb testing.TB) (n int64) {
	tb.Helper()
	stats, err := b.guest.Stats(tb.Context(), &api.StatsRequest{})
	check(tb, errgrpc.ToNative(err))
	for _, s := range stats.Sources {
		n += s.Bytes
	}
	return n
}

// everything is one way to read all of an image.
type everything struct {
	image, what string
	names       []string
}

// e10 is an application that reads everything: it should not have to wait longer than
// with a full pull, which has everything in the sandbox's memory when it starts.
func (l *lab) e10(tb testing.TB) {
	file := content{dir: "file", files: 1, size: int(l.bytes(l.length)), packs: true}
	files := treeOf(l.bytes(l.length) / 2)
	l.section("E10: an application that reads everything", fmt.Sprintf(
		"Seconds from the pull until all is read: a file of %s, or %d files of %s, by one thread; link of %s.",
		megabytes(file.total()), files.dirs*files.files, megabytes(int64(files.dirs*files.files*files.size)), l.shapeText()),
		"full pull", "lazy, nothing on the node", "lazy, image on the node")
	for _, f := range []struct {
		name string
		pack func([]byte) (registrytest.Layer, error)
	}{
		{"gzip", func(tar []byte) (registrytest.Layer, error) { return registrytest.GzipLevel(tar, 1) }},
		{"eStargz", lazy},
	} {
		repo := strings.ToLower(f.name)
		l.push(repo+"-file", file.layers(tb, "file", f.pack)...)
		layer, names := files.layer(tb, f.pack)
		l.push(repo+"-tree", layer)
		l.readAll(tb, everything{repo + "-file", f.name + ", one file from its beginning", file.names()})
		for _, o := range orders {
			order := slices.Clone(names)
			o.of(order)
			l.readAll(tb, everything{repo + "-tree", f.name + ", files " + o.name, order})
		}
	}
}

// readAll adds what one way to read takes.
func (l *lab) readAll(tb testing.TB, e everything) {
	tb.Helper()
	l.limit(true)
	var took, bytes values
	bytes[0] = none
	within(tb, func(tb testing.TB) {
		b := l.newPuller(tb)
		began := time.Now()
		check(tb, b.pullAll(tb.Context(), l.ref(e.image)))
		took[0] = b.readTimed(tb, e.names, began)
	})
	within(tb, func(tb testing.TB) {
		n := newNode(tb, protected, l.site, "")
		for i := 1; i <= 2; i++ {
			within(tb, func(tb testing.TB) {
				b := n.newSandbox(tb, "online")
				began := time.Now()
				check(tb, b.pull(tb.Context(), l.ref(e.image)))
				took[i] = b.readTimed(tb, e.names, began)
				bytes[i] = float64(b.fetched(tb)) / 1e6
			})
		}
	})
	l.add(row{e.what, "s", took, aim{"≤ 1.1× full pull", func(v values) bool { return max(v[1], v[2]) <= 1.1*v[0] }}},
		row{"– from the node to the sandbox", "MB", bytes, aim{}})
}

// readTimed reads files and returns the seconds since a moment.
func (b *sandbox) readTimed(tb testing.TB, names []string, since time.Time) float64 {
	tb.Helper()
	return time.Unix(0, b.mustRead(tb, names).Ended).Sub(since).Seconds()
}

// Whoever reads everything gets every byte; over the registry's link comes each once, but
// for what a busy machine asks for a second time, and the sandbox fetches little twice even where its memory is much smaller than what
// lies between two files of a directory.
func TestReadEverything(t *testing.T) {
	need(t)
	s := newSite(t, link.Shape{Rate: 50e6, RTT: time.Millisecond})
	files := treeOf(48 << 20)
	layer, names := files.layer(t, lazy)
	s.push("tree", layer)
	n := newNode(t, protected, s, noFill)
	most := map[string]float64{orders[0].name: 1.3, orders[1].name: 2.5}
	for _, o := range orders {
		t.Run(o.name, func(t *testing.T) {
			order := slices.Clone(names)
			o.of(order)
			b := n.newSandbox(t, "online")
			check(t, b.pull(t.Context(), s.ref("tree")))
			r := b.mustRead(t, order)
			got := float64(b.fetched(t)) / float64(r.Bytes)
			t.Logf("%d files of %s: %.2f of that from the node", len(order), megabytes(r.Bytes), got)
			if got < 1 || got > most[o.name] {
				t.Errorf("from the node came %.2f of what was read, want 1 to %.1f", got, most[o.name])
			}
		})
	}
	if sent, _ := s.sent("tree"); sent > int64(len(layer.Blob))*5/4 {
		t.Errorf("the registry sent %d bytes of a layer of %d", sent, len(layer.Blob))
	}
}
