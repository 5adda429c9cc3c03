package daemon

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/protocols/wireerr"
	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// asGuest makes the test binary tatami-guest; its worker inherits it.
const asGuest = "TATAMI_TEST_AS_GUEST"

func TestMain(m *testing.M) {
	if os.Getenv(asGuest) != "" {
		os.Exit(Main(os.Args[1:], os.Stderr))
	}
	os.Exit(m.Run())
}

// node is what a guest sees of its node: a relay and the Host service. The
// relay is an ordinary registry with segments.
type node struct {
	t   *testing.T
	dir string
	reg *registrytest.Server

	mu         sync.Mutex
	containers map[string]*api.DescribeResponse
	starts     []*api.RecordStartRequest // that were recorded
	ready      map[string]chan struct{}  // by container, closed when it is ready
	files      map[digest.Digest][]byte  // one-file images by their manifest
}

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts FUSE, EROFS and overlay")
	}
	dir := t.TempDir()
	n := newNodeOn(t, listenOn(t, "unix:"+filepath.Join(dir, "relay")), listenOn(t, "unix:"+filepath.Join(dir, "host")))
	n.dir = dir
	return n
}

func listenOn(t *testing.T, addr string) net.Listener {
	t.Helper()
	l, err := vsock.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// newNodeOn serves on listeners that it closes.
func newNodeOn(t *testing.T, relay, host net.Listener) *node {
	t.Helper()
	n := &node{t: t, reg: registrytest.Start(t, registrytest.Options{Listener: relay}), containers: make(map[string]*api.DescribeResponse), files: make(map[digest.Digest][]byte)}
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(wireerr.Server))
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterHostService(srv, n)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background(), host) }()
	t.Cleanup(func() {
		_, _ = srv.Close(), <-done // the server was told to end
	})
	return n
}

// Describe implements the Host service.
func (n *node) Describe(_ context.Context, req *api.DescribeRequest) (*api.DescribeResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c := n.containers[req.ContainerId]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", req.ContainerId, errdefs.ErrNotFound)
}

// RecordStart implements the Host service.
func (n *node) RecordStart(_ context.Context, req *api.RecordStartRequest) (*api.RecordStartResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.starts = append(n.starts, req)
	return &api.RecordStartResponse{}, nil
}

// AwaitReady implements the Host service.
func (n *node) AwaitReady(ctx context.Context, req *api.AwaitReadyRequest) (*api.AwaitReadyResponse, error) {
	select {
	case <-n.readiness(req.ContainerId):
		return &api.AwaitReadyResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// readiness is closed when a container is ready.
func (n *node) readiness(id string) chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ready == nil {
		n.ready = make(map[string]chan struct{})
	}
	if n.ready[id] == nil {
		n.ready[id] = make(chan struct{})
	}
	return n.ready[id]
}

// recorded returns the starts that were recorded so far.
func (n *node) recorded() []*api.RecordStartRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.starts)
}

// add lets the guest ask for a container.
func (n *node) add(id, ref string, img registrytest.Pushed, trust string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	name, _, _ := strings.Cut(strings.TrimPrefix(ref, "example.com/"), ":")
	n.containers[id] = &api.DescribeResponse{Reference: ref, Repository: name, ManifestDigest: img.Desc.Digest.String(), Class: "online", Trust: trust}
}

// pushIndex adds to the relay what a host makes of an image: the index as a
// referrer, and the segments.
func (n *node) pushIndex(repo string, img registrytest.Pushed, layers []registrytest.Layer) {
	n.t.Helper()
	n.pushIndexOf(repo, img.Desc, img, layers)
}

// pushIndexOf adds the index of an image as the referrer of another manifest.
func (n *node) pushIndexOf(repo string, subject ocispec.Descriptor, img registrytest.Pushed, layers []registrytest.Layer) {
	n.t.Helper()
	var built []*index.Layer
	segments := map[index.ID][]byte{}
	for i, l := range layers {
		var seg bytes.Buffer
		b, err := layer.Build(n.t.Context(), bytes.NewReader(l.Blob), img.Layers[i], &seg, layer.Options{})
		if err != nil {
			n.t.Fatal(err)
		}
		built = append(built, b)
		segments[b.Table.ID()] = seg.Bytes()
	}
	idx, err := bootstrap.Build(img.Desc.Digest, built)
	if err != nil {
		n.t.Fatal(err)
	}
	b, err := index.EncodeImage(idx)
	if err != nil {
		n.t.Fatal(err)
	}
	file := slices.Clone(idx.Bootstrap)
	for _, s := range idx.Segments {
		file = append(file, segments[s.ID]...)
	}
	n.files[img.Desc.Digest] = file
	n.reg.PushReferrer(repo, subject, index.ArtifactType, n.reg.PushBlob(repo, index.ImageType, b))
	for id, data := range segments {
		n.reg.PushSegment(repo, id, data)
	}
}

// show puts the one-file image where the guest finds such files, as virtio-fs
// would.
func (n *node) show(dir string, img registrytest.Pushed) (path string) {
	n.t.Helper()
	path = filepath.Join(dir, sharedimages.Name(img.Desc.Digest))
	if err := os.WriteFile(path, n.files[img.Desc.Digest], 0o600); err != nil {
		n.t.Fatal(err)
	}
	return path
}

// sampleFiles is how many files the sample image has, of sampleSize bytes.
const (
	sampleFiles = 24
	sampleSize  = 300_000
)

// samplePath and sampleContent tell what the sample image holds.
func samplePath(i int) string { return fmt.Sprintf("data/f%02d", i) }

func sampleContent(i int) string {
	b := make([]byte, sampleSize)
	_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(b) // never fails
	return string(b)
}

// pushSample adds an image of two layers with an index.
func (n *node) pushSample(repo string) registrytest.Pushed {
	n.t.Helper()
	lower := []registrytest.Entry{
		registrytest.Dir("data/", 0o755), registrytest.File("data/hidden", 0o644, "x"), registrytest.File("data/f00", 0o644, "old"),
		registrytest.Dir("etc/", 0o755), registrytest.File("etc/passwd", 0o644, "app:x:12:34::/:\n"),
	}
	upper := []registrytest.Entry{registrytest.Dir("data/", 0o750), registrytest.File("data/.wh.hidden", 0, "")}
	for i := range sampleFiles {
		upper = append(upper, registrytest.File(samplePath(i), 0o640, sampleContent(i)))
	}
	upper = append(upper, registrytest.Hardlink("data/again", samplePath(1)), registrytest.Symlink("link", "data/again"))
	layers := []registrytest.Layer{gz(lower...), gz(upper...)}
	img := n.reg.PushImage(repo, "v1", registrytest.Image{Layers: layers})
	n.pushIndex(repo, img, layers)
	return img
}

func gz(entries ...registrytest.Entry) registrytest.Layer {
	return registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(entries...))))
}

// guest is a running tatami-guest.
type guest struct {
	api.GuestService
	api.RunnerService
	cdh.ImagePullServiceService

	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	log    logBuffer
	client *ttrpc.Client
}

// logBuffer may be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// says waits a while until the log has a text: it comes through a pipe.
func (l *logBuffer) says(text string) bool {
	for range 500 {
		if strings.Contains(l.String(), text) {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

// startGuest runs tatami-guest with unix sockets and waits until it answers.
func startGuest(t *testing.T, n *node, args ...string) *guest {
	t.Helper()
	g := &guest{t: t, dir: t.TempDir()}
	all := []string{
		"--listen", "unix:" + g.path("guest"), "--stream-listen", "unix:" + g.path("streams"), "--cdh-socket", g.path("cdh"), "--state-dir", g.path("state"),
		"--host-address", "unix:" + filepath.Join(n.dir, "host"), "--relay-address", "unix:" + filepath.Join(n.dir, "relay"), "--registry", "false",
	}
	g.cmd = exec.CommandContext(context.Background(), "/proc/self/exe", append(all, args...)...)
	g.cmd.Env = append(os.Environ(), asGuest+"=1")
	g.cmd.Stderr = &g.log
	g.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.stop)
	g.connect()
	agent := g.dial("cdh")
	t.Cleanup(func() { _ = agent.Close() })
	g.ImagePullServiceService = cdh.NewImagePullServiceClient(agent)
	return g
}

func (g *guest) path(name string) string { return filepath.Join(g.dir, name) }

// dial waits until the socket is there.
func (g *guest) dial(name string) *ttrpc.Client {
	g.t.Helper()
	for range 1000 {
		conn, err := vsock.Dial(g.t.Context(), "unix:"+g.path(name))
		if err == nil {
			return ttrpc.NewClient(conn)
		}
		time.Sleep(10 * time.Millisecond)
	}
	g.t.Fatalf("nobody listens on %s:\n%s", name, g.log.String())
	return nil
}

// connect makes a new connection to the worker and waits for its answer.
func (g *guest) connect() {
	g.t.Helper()
	if g.client != nil {
		_ = g.client.Close() // perhaps to a worker that is dead
	}
	g.client = g.dial("guest")
	g.GuestService = api.NewGuestClient(g.client)
	g.RunnerService = api.NewRunnerClient(g.client)
	if _, err := g.Health(g.t.Context(), &api.HealthRequest{}); err != nil {
		g.t.Fatalf("health: %v", err)
	}
}

// stop ends the guest as a service manager does; nothing may stay mounted.
func (g *guest) stop() {
	_ = g.client.Close()                   // nothing is under way
	_ = g.cmd.Process.Signal(unix.SIGTERM) // it may have been told to power off
	if err := g.cmd.Wait(); err != nil {
		g.t.Errorf("tatami-guest: %v", err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(b, []byte(g.dir)) {
		g.t.Errorf("mounts are left below %s (%v)", g.dir, err)
	}
	if g.t.Failed() {
		g.t.Logf("log of tatami-guest:\n%s", g.log.String())
	}
}

// pull does what kata-agent does.
func (g *guest) pull(id, ref string) (string, error) {
	bundle := g.path(id)
	_, err := g.PullImage(g.t.Context(), &cdh.ImagePullRequest{ImageUrl: ref, BundlePath: bundle})
	return filepath.Join(bundle, "rootfs"), errgrpc.ToNative(err)
}

func (g *guest) mustPull(id, ref string) string {
	g.t.Helper()
	root, err := g.pull(id, ref)
	if err != nil {
		g.t.Fatal(err)
	}
	return root
}

func (g *guest) stats() *api.StatsResponse {
	g.t.Helper()
	s, err := g.Stats(g.t.Context(), &api.StatsRequest{})
	if err != nil {
		g.t.Fatal(err)
	}
	return s
}

// workerPID finds the worker: the child of the supervisor that is of this very
// program.
func (g *guest) workerPID() int {
	g.t.Helper()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		g.t.Fatal(err)
	}
	for range 1000 {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", g.cmd.Process.Pid))
		if err != nil || len(lists) == 0 {
			g.t.Fatalf("children of the supervisor: %v, %v", lists, err)
		}
		for _, list := range lists {
			b, _ := os.ReadFile(list) // threads come and go
			for _, pid := range strings.Fields(string(b)) {
				if exe, _ := os.Readlink("/proc/" + pid + "/exe"); exe == self {
					n, _ := strconv.Atoi(pid) // the kernel's own number
					return n
				}
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	g.t.Fatal("there is no worker")
	return 0
}

func dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// readAll reads a file in small steps without keeping its pages.
func readAll(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	return string(b), err
}
