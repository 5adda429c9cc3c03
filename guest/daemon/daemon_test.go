package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

const sampleRef = "example.com/sample:v1"

func TestPullReadAndUnmount(t *testing.T) {
	for _, path := range []string{"file", "loop"} {
		t.Run(path, func(t *testing.T) {
			n := newNode(t)
			n.add("c1", sampleRef, n.pushSample("sample"), "host")
			g := startGuest(t, n, "--mount-path", path)
			root := g.mustPull("c1", sampleRef)
			if s := g.stats(); s.MissBytes > 1<<20 {
				t.Errorf("mounting fetched %d bytes", s.MissBytes)
			}
			for i := range sampleFiles {
				got, err := os.ReadFile(filepath.Join(root, samplePath(i)))
				if err != nil || string(got) != sampleContent(i) {
					t.Fatalf("%s: %d bytes, %v", samplePath(i), len(got), err)
				}
			}
			if _, err := os.Stat(filepath.Join(root, "data/hidden")); !os.IsNotExist(err) {
				t.Errorf("data/hidden: %v", err)
			}
			if err := os.WriteFile(filepath.Join(root, "new"), []byte("x"), 0o600); err != nil {
				t.Error(err)
			}
			list, err := g.List(t.Context(), &api.ListRequest{})
			if err != nil || len(list.Mounts) != 1 || list.Mounts[0].Path != path || list.Mounts[0].Target != root || list.Mounts[0].Reference != sampleRef {
				t.Errorf("list %v, %v", list, err)
			}
			// The agent may ask twice; the second answer is the same mount.
			g.mustPull("c1", sampleRef)
			if _, err := g.Unmount(t.Context(), &api.UnmountRequest{Id: "c1"}); err != nil {
				t.Error(err)
			}
			if _, err := g.Unmount(t.Context(), &api.UnmountRequest{Id: "c1"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
				t.Errorf("the second unmount: %v", err)
			}
			if left, _ := os.ReadDir(filepath.Join(g.path("state"), "configs")); len(left) > 0 {
				t.Errorf("kept after the last unmount: %v", left)
			}
		})
	}
}

// TestLazyAsUnpacked mounts one image in both modes and compares every
// attribute of every file.
func TestLazyAsUnpacked(t *testing.T) {
	n := newNode(t)
	img := n.pushSample("sample")
	n.add("lazy", sampleRef, img, "host")
	n.add("full", sampleRef, img, "host")
	g := startGuest(t, n)
	trees := map[string]treecmp.Tree{}
	for id, mode := range map[string]api.Mode{"lazy": api.Mode_MODE_LAZY, "full": api.Mode_MODE_FULL} {
		target := g.path(id)
		resp, err := g.Mount(t.Context(), &api.MountRequest{Id: id, Target: target, Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		if (resp.Path == "unpacked") != (mode == api.Mode_MODE_FULL) || resp.ManifestDigest != img.Desc.Digest.String() || len(resp.Config) == 0 || len(resp.Phases) == 0 {
			t.Errorf("%s: %v", id, resp)
		}
		if trees[id], err = treecmp.Snapshot(target); err != nil {
			t.Fatal(err)
		}
		// Again, by the same words.
		again, err := g.Mount(t.Context(), &api.MountRequest{Id: id, Target: target, Mode: mode})
		if err != nil || string(again.Config) != string(resp.Config) || again.Path != resp.Path {
			t.Errorf("%s again: %v, %v", id, again, err)
		}
		if _, err = g.Mount(t.Context(), &api.MountRequest{Id: id, Target: target + "2", Mode: mode}); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
			t.Errorf("%s at another target: %v", id, err)
		}
	}
	if d := treecmp.Diff(trees["lazy"], trees["full"]); len(d) > 0 {
		t.Errorf("%q", d)
	}
}

func TestContainersAtTheSameTime(t *testing.T) {
	n := newNode(t)
	img := n.pushSample("sample")
	g := startGuest(t, n)
	var wg sync.WaitGroup
	for _, id := range []string{"a", "b", "c", "a", "b", "c"} {
		n.add(id, sampleRef, img, "host")
		wg.Go(func() {
			root, err := g.pull(id, sampleRef)
			if err != nil {
				t.Error(err)
				return
			}
			if got, err := os.ReadFile(filepath.Join(root, samplePath(3))); err != nil || string(got) != sampleContent(3) {
				t.Errorf("%s: %d bytes, %v", id, len(got), err)
			}
		})
	}
	wg.Wait()
	list, err := g.List(t.Context(), &api.ListRequest{})
	if err != nil || len(list.Mounts) != 3 {
		t.Errorf("%v, %v", list, err)
	}
}

func TestFallbacks(t *testing.T) {
	n := newNode(t)
	img := n.pushSample("sample")
	reg := registrytest.Start(t, registrytest.Options{})
	tarball := registrytest.Must(registrytest.Tar(registrytest.File("a", 0o644, strings.Repeat("hello ", 50_000))))
	toc := registrytest.Must(registrytest.EStargz(tarball))
	reg.PushImage("toc", "v1", registrytest.Image{Layers: []registrytest.Layer{toc}})
	reg.PushImage("plain", "v1", registrytest.Image{Layers: []registrytest.Layer{gz(registrytest.File("a", 0o644, "plain"))}})
	n.reg.PushImage("noindex", "v1", registrytest.Image{Layers: []registrytest.Layer{gz(registrytest.File("a", 0o644, "plain"))}})
	n.add("described", "example.com/noindex:v1", n.reg.PushImage("noindex", "v1", registrytest.Image{Layers: []registrytest.Layer{gz(registrytest.File("a", 0o644, "plain"))}}), "host")
	tocImage := n.reg.PushImage("toc", "v1", registrytest.Image{Layers: []registrytest.Layer{toc}})
	n.add("image", "example.com/toc:v1", tocImage, "image")
	n.add("plainimage", sampleRef, img, "image")
	n.add("signed", sampleRef, img, "signed")
	n.add("other", sampleRef, img, "image")
	elsewhere := n.reg.PushImage("sample", "v2", registrytest.Image{Layers: []registrytest.Layer{toc}}).Desc.Digest.String()

	g := startGuest(t, n, "--registry", "true", "--registry-address", "")
	cases := []struct {
		id, ref, path string
		class         func(error) bool
		want          string
	}{
		{id: "u1", ref: reg.Host() + "/toc:v1", path: "file"},
		{id: "u2", ref: reg.Host() + "/plain:v1", path: "unpacked"},
		{id: "described", ref: "example.com/noindex:v1", path: "unpacked"},
		{id: "image", ref: "example.com/toc:v1", path: "file"},
		{id: "plainimage", ref: sampleRef, path: "unpacked"},
		{id: "signed", ref: sampleRef, class: errdefs.IsPermissionDenied, want: `"signed"`},
		{id: "other", ref: sampleRef + "@" + elsewhere, class: errdefs.IsPermissionDenied, want: elsewhere},
		{id: "u3", ref: reg.Host() + "/none:v1", class: errdefs.IsNotFound, want: "none:v1"},
		{id: "u4", ref: "", class: errdefs.IsInvalidArgument, want: "image"},
		{id: "u5", ref: "No Reference", class: errdefs.IsInvalidArgument, want: "No Reference"},
	}
	for _, c := range cases {
		t.Run(c.id, func(t *testing.T) {
			root, err := g.pull(c.id, c.ref)
			if c.class != nil {
				if err == nil || !c.class(err) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error %v, want %q in it", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			list, err := g.List(t.Context(), &api.ListRequest{})
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(list.Mounts, func(m *api.Mount) bool { return m.Id == c.id })
			if i < 0 || list.Mounts[i].Path != c.path {
				t.Errorf("%v is not mounted as %s", list.Mounts, c.path)
			}
			if _, err := treecmp.Snapshot(root); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFullPullThroughAnAddress: every registry is reached at one address, and
// the node is not asked.
func TestFullPullThroughAnAddress(t *testing.T) {
	n := newNode(t)
	at := "unix:" + filepath.Join(t.TempDir(), "registry")
	reg := registrytest.Start(t, registrytest.Options{Listener: listenOn(t, at)})
	reg.PushImage("x", "v1", registrytest.Image{Layers: []registrytest.Layer{gz(registrytest.File("a", 0o644, "hello"))}})
	g := startGuest(t, n, "--registry", "true", "--registry-address", at, "--plain-http", "far.example:5000")
	target := g.path("root")
	resp, err := g.Mount(t.Context(), &api.MountRequest{Id: "c1", Reference: "far.example:5000/x:v1", Target: target, Mode: api.Mode_MODE_FULL})
	if err != nil || resp.Path != "unpacked" {
		t.Fatalf("%v, %v", resp, err)
	}
	if b, err := os.ReadFile(filepath.Join(target, "a")); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	if asked := len(n.reg.Requests("")); asked > 0 {
		t.Errorf("the relay was asked %d times", asked)
	}
}

func TestNobodyToAsk(t *testing.T) {
	n := newNode(t)
	g := startGuest(t, n, "--host-address", "unix:"+filepath.Join(n.dir, "nobody"))
	_, err := g.pull("c1", sampleRef)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("error %v", err)
	}
}

// TestAHostileRelay serves wrong bytes: they are counted, and never read.
func TestAHostileRelay(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	g := startGuest(t, n)
	root := g.mustPull("c1", sampleRef)
	var all []int64
	for off := int64(0); off < sampleFiles*sampleSize*2; off += 4096 {
		all = append(all, off)
	}
	remove := n.reg.Fault("/segments/", 0, registrytest.Corrupt(all...))
	if b, err := os.ReadFile(filepath.Join(root, samplePath(20))); !errors.Is(err, unix.EIO) {
		t.Errorf("read %d bytes, %v", len(b), err)
	}
	if s := g.stats(); s.VerifyFailures == 0 {
		t.Errorf("no failure was counted: %v", s)
	}
	remove()
	if b, err := os.ReadFile(filepath.Join(root, samplePath(20))); err != nil || string(b) != sampleContent(20) {
		t.Errorf("afterwards: %d bytes, %v", len(b), err)
	}
}

func TestAHostileIndex(t *testing.T) {
	n := newNode(t)
	layers := []registrytest.Layer{gz(registrytest.File("a", 0o644, "x"))}
	img := n.reg.PushImage("odd", "v1", registrytest.Image{Layers: layers})
	other := n.reg.PushImage("odd", "v2", registrytest.Image{Layers: []registrytest.Layer{gz(registrytest.File("b", 0o644, "y"))}})
	// An index of another image, and one that is none, as referrers of this.
	n.reg.PushReferrer("odd", img.Desc, "application/vnd.tatami.index.v1", n.reg.PushBlob("odd", "application/vnd.tatami.index.image.v1", []byte("garbage")))
	n.pushIndexOf("odd", img.Desc, other, []registrytest.Layer{gz(registrytest.File("b", 0o644, "y"))})
	n.add("c1", "example.com/odd:v1", img, "host")
	g := startGuest(t, n)
	root := g.mustPull("c1", "example.com/odd:v1")
	if b, err := os.ReadFile(filepath.Join(root, "a")); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	if !g.log.says("unpacking the whole image") {
		t.Error("the log does not tell that the image was unpacked")
	}
}

func TestOtherServicesOfTheHub(t *testing.T) {
	n := newNode(t)
	t.Run("not configured", func(t *testing.T) {
		g := startGuest(t, n)
		agent := g.dial("cdh")
		t.Cleanup(func() { _ = agent.Close() })
		_, err := cdh.NewSealedSecretServiceClient(agent).UnsealSecret(t.Context(), &cdh.UnsealSecretInput{})
		if err = errgrpc.ToNative(err); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "cdh_forward") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("forwarded", func(t *testing.T) {
		hub := newHub(t)
		g := startGuest(t, n, "--cdh-forward", hub)
		agent := g.dial("cdh")
		t.Cleanup(func() { _ = agent.Close() })
		out, err := cdh.NewSealedSecretServiceClient(agent).UnsealSecret(t.Context(), &cdh.UnsealSecretInput{Secret: []byte("s")})
		if err != nil || string(out.Plaintext) != "open s" {
			t.Errorf("%v, %v", out, err)
		}
		_, err = cdh.NewGetResourceServiceClient(agent).GetResource(t.Context(), &cdh.GetResourceRequest{ResourcePath: "x"})
		if err = errgrpc.ToNative(err); !errdefs.IsPermissionDenied(err) {
			t.Errorf("error %v", err)
		}
		if _, err := cdh.NewSecureMountServiceClient(agent).SecureMount(t.Context(), &cdh.SecureMountRequest{}); err != nil {
			t.Error(err)
		}
	})
}

// hub is a real Confidential Data Hub, as far as the agent can tell.
type hub struct{}

func (hub) UnsealSecret(_ context.Context, in *cdh.UnsealSecretInput) (*cdh.UnsealSecretOutput, error) {
	return &cdh.UnsealSecretOutput{Plaintext: append([]byte("open "), in.Secret...)}, nil
}

func (hub) SecureMount(context.Context, *cdh.SecureMountRequest) (*cdh.SecureMountResponse, error) {
	return &cdh.SecureMountResponse{}, nil
}

func (hub) GetResource(context.Context, *cdh.GetResourceRequest) (*cdh.GetResourceResponse, error) {
	return nil, errgrpc.ToGRPC(errdefs.ErrPermissionDenied)
}

func newHub(t *testing.T) string {
	t.Helper()
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	cdh.RegisterSealedSecretServiceService(srv, hub{})
	cdh.RegisterSecureMountServiceService(srv, hub{})
	cdh.RegisterGetResourceServiceService(srv, hub{})
	n := &node{t: t, dir: t.TempDir()}
	path := filepath.Join(n.dir, "hub")
	s := &sockets{}
	l, err := s.listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background(), l) }()
	t.Cleanup(func() { _, _ = srv.Close(), <-done })
	return path
}
