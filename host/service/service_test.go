package service

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/node"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// rig is a service with its node, a registry, and what the tools would call.
type rig struct {
	*Service
	control
	reg *registrytest.Server
	dir string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newScheduled(t, nil)
}

// newScheduled is a rig in which work waits for its turn.
func newScheduled(t *testing.T, turns *sched.Scheduler) *rig {
	t.Helper()
	g := &rig{reg: registrytest.Start(t, registrytest.Options{}), dir: t.TempDir()}
	client := registry.New(registry.Config{RetryMax: -1, Stall: 2 * time.Second, Sched: turns})
	n, err := node.Open(node.Config{Root: filepath.Join(g.dir, "root"), Registry: client, Sched: turns})
	if err != nil {
		t.Fatal(err)
	}
	g.Service = New(Config{Node: n, Sched: turns, Notes: filepath.Join(g.dir, "sandboxes.json")})
	g.control = control{g.Service}
	t.Cleanup(func() {
		g.Service.close(t.Context()) // which has ended
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		_ = client.Close() // never fails
	})
	return g
}

func (g *rig) push(object string, files map[string]string) registrytest.Pushed {
	var entries []registrytest.Entry
	for path, content := range files {
		entries = append(entries, registrytest.File(path, 0o644, content))
	}
	layer := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(entries...))))
	name, tag, _ := strings.Cut(object, ":")
	return g.reg.PushImage("library/"+name, tag, registrytest.Image{Layers: []registrytest.Layer{layer}})
}

func (g *rig) ref(object string) string { return g.reg.Host() + "/library/" + object }

// vm is what a guest has of its node.
type vm struct {
	id, path string
	api.HostService
	relay *registry.Client
}

// attach attaches a sandbox on hybrid sockets and connects as its guest would.
func (g *rig) attach(t *testing.T, id string) *vm {
	t.Helper()
	path := filepath.Join(g.dir, id+".sock")
	_, err := g.Attach(t.Context(), &api.AttachRequest{
		Sandbox:      id,
		HostAddress:  fmt.Sprintf("hybrid:%s:%d", path, vsock.HostPort),
		RelayAddress: fmt.Sprintf("hybrid:%s:%d", path, vsock.RelayPort),
	})
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{id: id, path: path}
	conn, err := v.dial(t.Context(), vsock.HostPort)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	v.HostService = api.NewHostClient(client)
	v.relay = registry.New(registry.Config{
		PlainHTTP: func(string) bool { return true }, RetryMax: -1,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) { return v.dial(ctx, vsock.RelayPort) },
	})
	t.Cleanup(func() {
		_, _ = client.Close(), v.relay.Close() // the test is over
	})
	return v
}

func (v *vm) dial(ctx context.Context, port uint32) (net.Conn, error) {
	return vsock.Dial(ctx, fmt.Sprintf("unix:%s_%d", v.path, port))
}

func (g *rig) add(t *testing.T, v *vm, container, object string) string {
	t.Helper()
	resp, err := g.AddContainer(t.Context(), &api.AddContainerRequest{Sandbox: v.id, ContainerId: container, Reference: g.ref(object)})
	if err != nil {
		t.Fatal(err)
	}
	return resp.ManifestDigest
}

func (v *vm) repo(t *testing.T, ref string) *registry.Repository {
	t.Helper()
	named, err := image.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	return v.relay.Mirror("relay", named)
}

// The whole way of a guest: describe, manifest, config, referrers, index,
// segments. What it gets verifies.
func TestGuestWay(t *testing.T) {
	g := newRig(t)
	pushed := g.push("app:v1", map[string]string{"a": strings.Repeat("tatami ", 100_000), "b": "x"})
	v := g.attach(t, "one")
	manifest := g.add(t, v, "c1", "app:v1")
	d, err := v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	if d.Reference != g.ref("app:v1") || d.Repository != "library/app" || d.ManifestDigest != manifest || d.Class != "online" || d.Trust != "host" {
		t.Errorf("described %v", d)
	}
	ref, err := image.ParseReference(g.ref("app@" + d.ManifestDigest))
	if err != nil {
		t.Fatal(err)
	}
	repo := v.repo(t, ref.String())
	img, err := image.Resolve(t.Context(), repo, ref, image.DefaultPlatform())
	if err != nil || img.Desc.Digest != pushed.Desc.Digest {
		t.Fatalf("resolved %+v, %v", img, err)
	}
	idx := fetchIndex(t, repo, img.Desc.Digest)
	g.reg.Close() // from here on the node has all
	for _, s := range idx.Segments {
		verify(t, repo, s)
	}
	stats, err := g.NodeStats(t.Context(), &api.NodeStatsRequest{})
	if err != nil || stats.Images != 1 || stats.Sandboxes != 1 || stats.RelayBytes < idx.Segments[0].Table.Size || stats.RegistryBytes < pushed.Layers[0].Size {
		t.Errorf("stats %v, %v", stats, err)
	}
	if stats.Store.HitBytes == 0 || stats.Store.Misses != 0 || stats.Store.ResidentBytes == 0 {
		t.Errorf("store %v", stats.Store)
	}
}

func fetchIndex(t *testing.T, repo *registry.Repository, d digest.Digest) *index.Image {
	t.Helper()
	refs, err := repo.Referrers(t.Context(), d, index.ArtifactType)
	if err != nil || len(refs) != 1 {
		t.Fatalf("referrers %v, %v", refs, err)
	}
	data, err := repo.Manifest(t.Context(), refs[0])
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	blob, err := repo.Blob(t.Context(), m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	idx, err := index.DecodeImage(blob)
	if err != nil || idx.Manifest != d {
		t.Fatalf("index of %s: %v", idx.Manifest, err)
	}
	return idx
}

// verify reads a segment and compares every chunk.
func verify(t *testing.T, repo *registry.Repository, s index.Segment) {
	t.Helper()
	body, err := repo.SegmentRange(t.Context(), s.ID, 0, s.Table.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	data, err := io.ReadAll(body)
	if err != nil || int64(len(data)) != s.Table.Size {
		t.Fatalf("segment: %d of %d bytes, %v", len(data), s.Table.Size, err)
	}
	for i, c := range s.Table.Chunks {
		if sha256.Sum256(data[c.Off:c.End()]) != c.Sum {
			t.Fatalf("chunk %d has wrong bytes", i)
		}
	}
}

// A sandbox sees its own containers and reads its own images, and nothing else
// that the node has.
func TestAuthorisation(t *testing.T) {
	g := newRig(t)
	mine := g.push("mine:v1", map[string]string{"a": "mine"})
	g.push("theirs:v1", map[string]string{"b": "theirs"})
	one, two := g.attach(t, "one"), g.attach(t, "two")
	g.add(t, one, "c1", "mine:v1")
	theirs := g.add(t, two, "c2", "theirs:v1")
	_, err := one.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c2"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "AddContainer") {
		t.Errorf("another sandbox's container: %v", err)
	}
	idx := fetchIndex(t, two.repo(t, g.ref("theirs")), digest.Digest(theirs))
	segment := idx.Segments[0].ID
	for _, object := range []string{"mine", "theirs"} {
		want := errdefs.IsNotFound // not in the repository that is granted
		if object == "theirs" {
			want = errdefs.IsPermissionDenied
		}
		repo := one.repo(t, g.ref(object))
		_, err := repo.Manifest(t.Context(), ocispec.Descriptor{Digest: digest.Digest(theirs)})
		_, segmentErr := repo.SegmentRange(t.Context(), segment, 0, 1)
		_, blobErr := repo.Range(t.Context(), idx.Segments[0].Layer, 0, 1)
		for _, err := range []error{err, segmentErr, blobErr} {
			if !want(err) {
				t.Errorf("%s: %v", object, err)
			}
		}
	}
	if _, err := one.repo(t, g.ref("mine")).Manifest(t.Context(), mine.Desc); err != nil {
		t.Errorf("its own: %v", err)
	}
	if _, err := one.repo(t, "quay.io/library/mine").Manifest(t.Context(), mine.Desc); !errdefs.IsPermissionDenied(err) {
		t.Errorf("the same name of another registry: %v", err)
	}
}

// Detach takes everything away at once; images can be removed after it.
func TestDetach(t *testing.T) {
	g := newRig(t)
	g.push("app:v1", map[string]string{"a": "x"})
	v := g.attach(t, "one")
	manifest := g.add(t, v, "c1", "app:v1")
	if _, err := g.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: manifest}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removing what is in use: %v", err)
	}
	if _, err := g.Detach(t.Context(), &api.DetachRequest{Sandbox: "one"}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.dial(t.Context(), vsock.RelayPort); err == nil {
		t.Error("the relay still listens")
	}
	if _, err := v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c1"}); err == nil {
		t.Error("the host service still answers")
	}
	left, err := filepath.Glob(v.path + "_*")
	if err != nil || len(left) > 0 {
		t.Errorf("sockets left: %v, %v", left, err)
	}
	if _, err := g.Detach(t.Context(), &api.DetachRequest{Sandbox: "one"}); !errdefs.IsNotFound(err) {
		t.Errorf("twice: %v", err)
	}
	if _, err := g.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: manifest}); err != nil {
		t.Errorf("remove: %v", err)
	}
	g.attach(t, "one") // the name is free again
}

// A sandbox that reads while it is detached gets an end, and the node can close.
func TestDetachWhileReading(t *testing.T) {
	g := newRig(t)
	p := g.push("app:v1", map[string]string{"a": strings.Repeat("0123456789abcdef", 1<<20)})
	v := g.attach(t, "one")
	g.add(t, v, "c1", "app:v1")
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return v.dial(ctx, vsock.RelayPort) }}}
	idx := fetchIndex(t, v.repo(t, g.ref("app")), p.Desc.Digest)
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://relay/v2/library/app/segments/"+idx.Segments[0].ID.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Detach(t.Context(), &api.DetachRequest{Sandbox: "one"}); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err == nil {
		t.Errorf("the answer ended as if it were whole after %d bytes", n)
	}
}

func TestAttachErrors(t *testing.T) {
	g := newRig(t)
	g.attach(t, "one")
	ok := "unix:" + filepath.Join(g.dir, "free")
	taken := "hybrid:" + filepath.Join(g.dir, "one.sock") + ":2110"
	for _, tc := range []struct {
		name               string
		sandbox, host, rel string
		class              func(error) bool
	}{
		{"twice", "one", ok + "1", ok + "2", errdefs.IsAlreadyExists},
		{"no name", "", ok + "1", ok + "2", errdefs.IsInvalidArgument},
		{"long name", strings.Repeat("x", 300), ok + "1", ok + "2", errdefs.IsInvalidArgument},
		{"no address", "two", "", ok + "2", errdefs.IsInvalidArgument},
		{"bad address", "two", ok + "1", "tcp:1", errdefs.IsInvalidArgument},
		{"address taken", "two", ok + "1", taken, errdefs.IsAlreadyExists},
		{"shared without cid", "two", ok + "1", "vsock:2111", errdefs.IsInvalidArgument},
	} {
		_, err := g.Attach(t.Context(), &api.AttachRequest{Sandbox: tc.sandbox, HostAddress: tc.host, RelayAddress: tc.rel})
		if !tc.class(err) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	if n := g.attached(); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
	if left, _ := filepath.Glob(filepath.Join(g.dir, "free*")); len(left) > 0 {
		t.Errorf("sockets left: %v", left)
	}
}

func TestAddContainer(t *testing.T) {
	g := newRig(t)
	g.push("app:v1", map[string]string{"a": "x"})
	g.push("other:v1", map[string]string{"a": "y"})
	g.attach(t, "one")
	good := func() *api.AddContainerRequest {
		return &api.AddContainerRequest{Sandbox: "one", ContainerId: "c", Reference: g.ref("app:v1"), Class: "batch"}
	}
	for range 2 { // saying it twice is fine
		if _, err := g.AddContainer(t.Context(), good()); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		change func(*api.AddContainerRequest)
		class  func(error) bool
	}{
		"unknown sandbox": {func(r *api.AddContainerRequest) { r.Sandbox = "two" }, errdefs.IsNotFound},
		"unknown class":   {func(r *api.AddContainerRequest) { r.Class = "bulk" }, errdefs.IsInvalidArgument},
		"other class":     {func(r *api.AddContainerRequest) { r.Class = "online" }, errdefs.IsAlreadyExists},
		"other image":     {func(r *api.AddContainerRequest) { r.Reference = g.ref("other:v1") }, errdefs.IsAlreadyExists},
		"no id":           {func(r *api.AddContainerRequest) { r.ContainerId = "" }, errdefs.IsInvalidArgument},
		"no reference":    {func(r *api.AddContainerRequest) { r.ContainerId, r.Reference = "d", "" }, errdefs.IsInvalidArgument},
		"absent image":    {func(r *api.AddContainerRequest) { r.ContainerId, r.Reference = "d", g.ref("absent:v1") }, errdefs.IsNotFound},
	} {
		req := good()
		tc.change(req)
		if _, err := g.AddContainer(t.Context(), req); !tc.class(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	box, err := g.find("one")
	if err != nil || len(box.granted()) != 1 {
		t.Errorf("grants %v, %v", box.granted(), err)
	}
	// Refused containers hold no image.
	if _, err := g.Detach(t.Context(), &api.DetachRequest{Sandbox: "one"}); err != nil {
		t.Fatal(err)
	}
	for _, object := range []string{"app:v1", "other:v1"} {
		p, err := g.Prepare(t.Context(), &api.PrepareRequest{Reference: g.ref(object)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := g.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: p.ManifestDigest}); err != nil {
			t.Errorf("remove %s: %v", object, err)
		}
	}
}

// Sockets that a killed process left are removed at the next start; those that
// somebody serves, and files that are no sockets, are not.
func TestLeftovers(t *testing.T) {
	g := newRig(t)
	dead, live, file := filepath.Join(g.dir, "dead"), filepath.Join(g.dir, "live"), filepath.Join(g.dir, "file")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	served, err := new(net.ListenConfig).Listen(t.Context(), "unix", live)
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	note := func(host, relay string) note {
		return note{ID: digest.FromString(host).Encoded(), Host: "unix:" + host, Relay: "unix:" + relay}
	}
	at := filepath.Join(g.dir, "before.json")
	before := openNotes(at, g.log)
	before.put(note(dead, live))
	before.put(note(file, filepath.Join(g.dir, "absent")))
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	New(Config{Notes: at}).close(t.Context())
	for path, want := range map[string]bool{dead: false, live: true, file: true} {
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", path, err == nil, want)
		}
	}
	if left := openNotes(at, g.log).list(); len(left) > 0 {
		t.Errorf("without Restore there is left %v", left)
	}
	g.attach(t, "one")
	data, err := os.ReadFile(g.Service.cfg.Notes)
	if want := filepath.Join(g.dir, "one.sock:2110"); err != nil || !strings.Contains(string(data), want) {
		t.Errorf("noted %s, %v", data, err)
	}
}

// What is pinned, and what the store takes, can be seen; a pin that is none is refused.
func TestPin(t *testing.T) {
	g := newRig(t)
	g.push("app:v1", map[string]string{"a": strings.Repeat("a", 1<<20)})
	ref := g.reg.Host() + "/library/app:v1"
	if _, err := g.Prepare(t.Context(), &api.PrepareRequest{Reference: ref}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Pin(t.Context(), &api.PinRequest{Reference: ref}); err != nil {
		t.Fatal(err)
	}
	st, err := g.Status(t.Context(), &api.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if s := st.Store; s.Used == 0 || s.Pinned != s.Used || s.Quota != 0 || len(s.Pins) != 1 || s.Pins[0] != ref {
		t.Errorf("%+v", s)
	}
	if _, err := g.Unpin(t.Context(), &api.UnpinRequest{Reference: ref}); err != nil {
		t.Fatal(err)
	}
	if st, err = g.Status(t.Context(), &api.StatusRequest{}); err != nil || st.Store.Pinned != 0 || len(st.Store.Pins) != 0 {
		t.Errorf("after unpin: %+v, %v", st.Store, err)
	}
	if _, err := g.Unpin(t.Context(), &api.UnpinRequest{Reference: ref}); !errdefs.IsNotFound(err) {
		t.Errorf("unpin twice: %v", err)
	}
	if _, err := g.Pin(t.Context(), &api.PinRequest{Reference: "a b"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pin of no reference: %v", err)
	}
}
