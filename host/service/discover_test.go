package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/tatami-containers/tatami/host/kata"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// patience bounds what a test waits for.
const patience = 20 * time.Second

// host is a service that finds sandboxes, beside what Kata and containerd have
// on a node.
type host struct {
	*rig
	runDir, state string
	log           *lockedBuffer
	ports         func() *fakePort // of AF_VSOCK, as they are opened
	stop          func()           // ends it as Run does
}

// lockedBuffer is a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // protected by mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// images answers as a snapshotter does.
type images map[string]Image

func (i images) Lookup(_ context.Context, id string) (Image, error) {
	c, ok := i[id]
	if !ok {
		return Image{}, fmt.Errorf("snapshot of %s: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func newHost(t *testing.T, known Containers) *host {
	t.Helper()
	h := &host{rig: newRig(t)}
	h.runDir, h.state = filepath.Join(h.dir, "kata"), filepath.Join(h.dir, "containerd")
	h.start(t, known)
	return h
}

// start starts a service on the rig's node, in place of the one that is over.
func (h *host) start(t *testing.T, known Containers) {
	t.Helper()
	h.log = new(lockedBuffer)
	s := New(Config{
		Node: h.cfg.Node, Notes: filepath.Join(h.dir, "notes.json"), Restore: true,
		Discovery: &Discovery{RunDirs: []string{h.runDir}, HostPort: 2110, RelayPort: 2111, ContainerdState: h.state, Containers: known},
		Log:       slog.New(slog.NewTextHandler(h.log, nil)),
	})
	fake, bound := newFakePorts()
	h.ports = bound
	s.ports.bind = func(addr string) (net.Listener, error) {
		if strings.HasPrefix(addr, "vsock:") {
			return fake.bind(addr)
		}
		return vsock.Listen(addr)
	}
	s.ports.peer = fake.peer
	h.Service, h.control = s, control{s}
	s.Restore()
	stop := s.runDiscovery(t.Context())
	h.stop = sync.OnceFunc(func() {
		stop()
		s.finish(t.Context())
	})
	t.Cleanup(h.stop)
}

// shim serves GET /agent-url for a sandbox until the result is called, which
// removes its directory, as both of Kata's do at the end of a sandbox.
func (h *host) shim(t *testing.T, id string, url func() string) (over func()) {
	t.Helper()
	dir := filepath.Join(h.runDir, id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(dir, "shim-monitor.sock"))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, url()) })
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: patience}
	go func() { _ = srv.Serve(l) }() // ends with Close
	over = func() { _, _ = srv.Close(), os.RemoveAll(dir) }
	t.Cleanup(over)
	return over
}

// vmm is a sandbox with a hybrid VMM.
func (h *host) vmm(t *testing.T, id string) (v *vm, over func()) {
	t.Helper()
	v = &vm{id: id, path: filepath.Join(h.runDir, id, "ch-vm.sock")}
	over = h.shim(t, id, func() string { return "hvsock://" + v.path + ":1024" })
	v.wait(t, true)
	v.connect(t)
	return v, over
}

// wait waits until the sandbox is served, or is not.
func (v *vm) wait(t *testing.T, served bool) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		c, err := v.dial(t.Context(), vsock.RelayPort)
		if err == nil {
			_ = c.Close() // only the answer counted
		}
		if (err == nil) == served {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("sandbox %s served: %v, %v", v.id, !served, err)
		}
	}
}

// connect opens what a guest has of its node.
func (v *vm) connect(t *testing.T) {
	t.Helper()
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
}

func (v *vm) describe(t *testing.T, id string) (*api.DescribeResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	d, err := v.Describe(ctx, &api.DescribeRequest{ContainerId: id})
	return d, errgrpc.ToNative(err)
}

// bundle makes a container as containerd's CRI plugin does; the result removes
// it.
func (h *host) bundle(t *testing.T, id, sandbox, image string) (remove func()) {
	t.Helper()
	dir := filepath.Join(h.state, "io.containerd.runtime.v2.task", "k8s.io", id)
	spec, err := json.Marshal(specs.Spec{Version: specs.Version, Annotations: map[string]string{
		"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": sandbox, "io.kubernetes.cri.image-name": image,
	}})
	if err = errors.Join(err, os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "config.json"), spec, 0o600)); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// The whole way of a guest that nobody told the node of.
func TestFoundGuest(t *testing.T) {
	h := newHost(t, nil)
	pushed := h.push("app:v1", map[string]string{"a": strings.Repeat("tatami ", 100_000)})
	one, over := h.vmm(t, "one")
	two, _ := h.vmm(t, "two")
	h.bundle(t, "c1", "one", h.ref("app:v1"))
	h.bundle(t, "noimage", "one", "")
	h.bundle(t, "digest", "one", pushed.Desc.Digest.String())
	d, err := one.describe(t, "c1")
	if err != nil || d.Reference != h.ref("app:v1") || d.Repository != "library/app" || d.ManifestDigest != pushed.Desc.Digest.String() || d.Class != "online" || d.Trust != "host" {
		t.Fatalf("described %v, %v", d, err)
	}
	idx := fetchIndex(t, one.repo(t, h.ref("app:v1")), pushed.Desc.Digest)
	verify(t, one.repo(t, h.ref("app:v1")), idx.Segments[0])
	// Another sandbox's container, one that is not there, and names that are
	// none have the same answer.
	var answers []string
	for _, id := range []string{"c1", "c2", "", "..", "../k8s.io/c1"} {
		_, err := two.describe(t, id)
		if !errdefs.IsNotFound(err) {
			t.Errorf("%q: %v", id, err)
		}
		answers = append(answers, strings.ReplaceAll(err.Error(), fmt.Sprintf("%q", id), ""))
	}
	for _, a := range answers {
		if a != answers[0] {
			t.Errorf("%q and %q", a, answers[0])
		}
	}
	// When it cannot be told, that is another answer.
	tasks := filepath.Join(h.state, "io.containerd.runtime.v2.task")
	if err := errors.Join(os.Rename(tasks, tasks+".away"), os.WriteFile(tasks, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := two.describe(t, "c1"); !errdefs.IsUnavailable(err) {
		t.Errorf("without containerd's directory: %v", err)
	}
	if _, err := one.describe(t, "c1"); err != nil {
		t.Errorf("a container that is known: %v", err)
	}
	if err := errors.Join(os.Remove(tasks), os.Rename(tasks+".away", tasks)); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(h.log.String(), "not its own"); n != 1 {
		t.Errorf("a guest made the log say so %d times", n)
	}
	if _, err := two.repo(t, h.ref("app:v1")).Referrers(t.Context(), pushed.Desc.Digest, ""); !errdefs.IsPermissionDenied(err) {
		t.Errorf("the relay of another: %v", err)
	}
	for _, id := range []string{"noimage", "digest"} {
		if _, err := one.describe(t, id); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", id, err)
		}
	}
	// The control socket can add to it, but not attach it again.
	if _, err := h.AddContainer(t.Context(), &api.AddContainerRequest{Sandbox: "one", ContainerId: "by-hand", Reference: h.ref("app:v1")}); err != nil {
		t.Error(err)
	}
	if _, err := h.Attach(t.Context(), &api.AttachRequest{Sandbox: "one", HostAddress: "unix:" + h.dir + "/h", RelayAddress: "unix:" + h.dir + "/r"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("attach: %v", err)
	}
	if _, err := one.describe(t, "by-hand"); err != nil {
		t.Error(err)
	}
	over()
	one.wait(t, false)
	h.free(t, pushed.Desc.Digest)
}

// free waits until nothing holds an image, and removes it.
func (h *host) free(t *testing.T, d digest.Digest) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		_, err := h.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: d.String()})
		if err == nil {
			return
		}
		if !errdefs.IsFailedPrecondition(err) || time.Now().After(end) {
			t.Fatalf("remove: %v", err)
		}
	}
}

// A sandbox that is attached by hand stays so when it is found, and when it is
// gone.
func TestAttachedByHandStays(t *testing.T) {
	h := newHost(t, nil)
	v := h.attach(t, "one")
	over := h.shim(t, "one", func() string { return "vsock://77:1024" })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 2 {
		if err := h.watcher.Rescan(ctx); err != nil {
			t.Fatal(err)
		}
		box, err := h.find("one")
		if err != nil || box.at.found {
			t.Fatalf("sandbox %+v, %v", box, err)
		}
		over()
	}
	v.wait(t, true)
}

// A guest of QEMU that is faster than its shim: its connection waits.
func TestFasterThanTheShim(t *testing.T) {
	h := newHost(t, nil)
	h.push("app:v1", map[string]string{"a": "x"})
	h.bundle(t, "c1", "one", h.ref("app:v1"))
	port := h.ports() // of the Host service
	closedByPeer(t, port.connect(500))
	for _, cid := range []uint32{0, 1, 2} {
		closedByPeer(t, port.connect(cid))
	}
	var asked, answer = make(chan struct{}, 100), make(chan struct{})
	h.shim(t, "one", func() string {
		asked <- struct{}{}
		<-answer
		return "vsock://501:1024"
	})
	<-asked
	client := ttrpc.NewClient(port.connect(501))
	defer client.Close()
	described := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := api.NewHostClient(client).Describe(ctx, &api.DescribeRequest{ContainerId: "c1"})
		described <- err
	}()
	select {
	case err := <-described:
		t.Fatalf("described before the sandbox was found: %v", err)
	case <-time.After(50 * time.Millisecond): // long enough to be refused
	}
	close(answer)
	if err := <-described; err != nil {
		t.Error(err)
	}
	// A machine that is nobody's is looked for once, for a while.
	before := len(h.misses.at)
	closedByPeer(t, port.connect(502))
	closedByPeer(t, port.connect(502))
	if got := len(h.misses.at); got != before+1 || !h.misses.recent(502) || h.misses.recent(501) {
		t.Errorf("%d misses, %d before", got, before)
	}
}

// A snapshot pins what its container gets, whatever the tag means by now; the
// registry is not asked for what the node has.
func TestDescribePinned(t *testing.T) {
	known := images{}
	h := newHost(t, known)
	first := h.push("app:v1", map[string]string{"a": "x"})
	second := h.push("app:v1", map[string]string{"a": "y"})
	known["pinned"] = Image{Reference: h.ref("app:v1"), Manifest: first.Desc.Digest}
	known["again"] = known["pinned"]
	v, _ := h.vmm(t, "one")
	for id, want := range map[string]registrytest.Pushed{"pinned": first, "moved": second} {
		h.bundle(t, id, "one", h.ref("app:v1"))
		if d, err := v.describe(t, id); err != nil || d.ManifestDigest != want.Desc.Digest.String() || d.Reference != h.ref("app:v1") {
			t.Errorf("%s: %v, %v, want %s", id, d, err, want.Desc.Digest)
		}
	}
	h.reg.Close()
	h.bundle(t, "again", "one", h.ref("app:v1"))
	if d, err := v.describe(t, "again"); err != nil || d.ManifestDigest != first.Desc.Digest.String() {
		t.Errorf("without the registry: %v, %v", d, err)
	}
}

// A container that no snapshot is known of gets what its tag means when it
// starts, not what it meant to the container before.
func TestDescribeTagMoved(t *testing.T) {
	h := newHost(t, nil)
	v, _ := h.vmm(t, "one")
	var last digest.Digest
	for i := range 2 {
		last = h.push("app:v1", map[string]string{"a": fmt.Sprint(i)}).Desc.Digest
		id := fmt.Sprintf("c%d", i)
		h.bundle(t, id, "one", h.ref("app:v1"))
		if d, err := v.describe(t, id); err != nil || d.ManifestDigest != last.String() {
			t.Errorf("%s: %v, %v, want %s", id, d, err, last)
		}
	}
	h.reg.Close()
	h.bundle(t, "c2", "one", h.ref("app:v1"))
	if d, err := v.describe(t, "c2"); err != nil || d.ManifestDigest != last.String() {
		t.Errorf("without the registry: %v, %v", d, err)
	}
}

// Everybody who asks for a container while its image is prepared shares that,
// and who goes away disturbs nobody.
func TestDescribeShared(t *testing.T) {
	h := newHost(t, nil)
	pushed := h.push("app:v1", map[string]string{"a": "x"})
	v, _ := h.vmm(t, "one")
	h.bundle(t, "c1", "one", h.ref("app:v1"))
	h.reg.Fault("/manifests/", 1, registrytest.Delay(300*time.Millisecond))
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := v.Describe(ctx, &api.DescribeRequest{ContainerId: "c1"})
		left <- err
	}()
	for len(h.reg.Requests("/manifests/")) == 0 {
		time.Sleep(time.Millisecond)
	}
	var wg sync.WaitGroup
	for range maxUnanswered / 2 {
		wg.Go(func() {
			if d, err := v.describe(t, "c1"); err != nil || d.ManifestDigest != pushed.Desc.Digest.String() {
				t.Errorf("described %v, %v", d, err)
			}
		})
	}
	cancel()
	if err := <-left; err == nil {
		t.Error("the call that was cancelled was answered")
	}
	wg.Wait()
	if n := len(h.reg.Requests("/manifests/v1")); n > 2 { // HEAD and GET
		t.Errorf("the registry was asked %d times", n)
	}
}

// One sandbox prepares a bounded number of images at a time; ending it ends
// them.
func TestLookupsAreBounded(t *testing.T) {
	h := newHost(t, nil)
	v, over := h.vmm(t, "one")
	const n = maxLookups + 4
	h.reg.Fault("/manifests/", 0, registrytest.Delay(patience))
	answers := make(chan error, n)
	for i := range n {
		id := fmt.Sprintf("c%d", i)
		h.push(id+":v1", map[string]string{"a": id})
		h.bundle(t, id, "one", h.ref(id+":v1"))
		go func() {
			_, err := v.describe(t, id)
			answers <- err
		}()
	}
	for len(h.reg.Requests("/manifests/")) < maxLookups {
		time.Sleep(time.Millisecond)
	}
	box, err := h.find("one")
	if err != nil {
		t.Fatal(err)
	}
	for waits := false; !waits; time.Sleep(time.Millisecond) {
		box.mu.Lock()
		waits = len(box.lookups) == n
		box.mu.Unlock()
	}
	if got := len(h.reg.Requests("/manifests/")); got != maxLookups {
		t.Errorf("%d prepared at a time", got)
	}
	over()
	for range n {
		if err := <-answers; err == nil {
			t.Error("a container of a sandbox that is over was described")
		}
	}
}

// What a guest hears of a registry is the class of the error.
func TestRegistryErrorsStayOnTheNode(t *testing.T) {
	h := newHost(t, nil)
	v, _ := h.vmm(t, "one")
	h.push("app:v1", map[string]string{"a": "x"})
	h.bundle(t, "c1", "one", h.ref("app:v1"))
	h.bundle(t, "absent", "one", h.ref("absent:v2"))
	h.bundle(t, "name", "one", "!")
	// Nobody listens at that token service.
	well := h.reg.Fault("/manifests/v1", 0, registrytest.Status(http.StatusUnauthorized, "WWW-Authenticate", `Bearer realm="http://user:secret@127.0.0.1/token?key=secret"`))
	for id, class := range map[string]func(error) bool{"c1": errdefs.IsUnavailable, "absent": errdefs.IsNotFound, "name": errdefs.IsInvalidArgument} {
		_, err := v.describe(t, id)
		if !class(err) || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), h.reg.Host()) {
			t.Errorf("%s: %v", id, err)
		}
	}
	if log := h.log.String(); strings.Contains(log, "secret") || !strings.Contains(log, "cannot be described") {
		t.Errorf("log: %s", log)
	}
	well()
	if _, err := v.describe(t, "c1"); err != nil {
		t.Errorf("after the registry is well again: %v", err)
	}
}

// A container that is gone gives back its image, but not under a reader.
func TestContainerGone(t *testing.T) {
	h := newHost(t, nil)
	app := h.push("app:v1", map[string]string{"a": strings.Repeat("0123456789abcdef", 1<<20)})
	other := h.push("other:v1", map[string]string{"a": "y"})
	v, _ := h.vmm(t, "one")
	remove := h.bundle(t, "c1", "one", h.ref("app:v1"))
	h.bundle(t, "c2", "one", h.ref("other:v1"))
	for _, id := range []string{"c1", "c2"} {
		if _, err := v.describe(t, id); err != nil {
			t.Fatal(err)
		}
	}
	h.sweep()
	idx := fetchIndex(t, v.repo(t, h.ref("app")), app.Desc.Digest)
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return v.dial(ctx, vsock.RelayPort) }}}
	defer hc.CloseIdleConnections()
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
	remove()
	h.sweep()
	if _, err := v.describe(t, "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("describe: %v", err)
	}
	if _, err := h.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: app.Desc.Digest.String()}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removed under a reader: %v", err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != idx.Segments[0].Table.Size-1000 {
		t.Errorf("the reader got %d bytes, %v", n, err)
	}
	h.free(t, app.Desc.Digest)
	if _, err := h.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: other.Desc.Digest.String()}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the image of a container that is there: %v", err)
	}
	if _, err := v.repo(t, h.ref("app")).Manifest(t.Context(), app.Desc); !errdefs.IsPermissionDenied(err) {
		t.Errorf("the relay: %v", err)
	}
}

// What was attached, by hand or because it was found, is there again with its
// containers in the next process, before it is served.
func TestServiceRestart(t *testing.T) {
	h := newHost(t, nil)
	app := h.push("app:v1", map[string]string{"a": strings.Repeat("tatami ", 10_000)})
	byHand := h.attach(t, "hand")
	h.add(t, byHand, "c0", "app:v1")
	found, _ := h.vmm(t, "found")
	h.bundle(t, "c1", "found", h.ref("app:v1"))
	gone := h.bundle(t, "c2", "found", h.ref("app:v1"))
	gonePod, over := h.vmm(t, "gone")
	h.bundle(t, "c3", "gone", h.ref("app:v1"))
	for v, ids := range map[*vm][]string{found: {"c1", "c2"}, gonePod: {"c3"}} {
		for _, id := range ids {
			if _, err := v.describe(t, id); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.stop()
	if left, err := filepath.Glob(filepath.Join(h.dir, "*_*")); err != nil || len(left) > 0 {
		t.Errorf("sockets left %v, %v", left, err)
	}
	gone()
	over()
	h.reg.Close()
	h.start(t, nil)
	for v, ids := range map[*vm][]string{byHand: {"c0"}, found: {"c1"}} {
		v.wait(t, true)
		// The relay serves at once: the guest does not describe again.
		verify(t, v.repo(t, h.ref("app:v1")), fetchIndex(t, v.repo(t, h.ref("app:v1")), app.Desc.Digest).Segments[0])
		v.connect(t)
		for _, id := range ids {
			if _, err := v.describe(t, id); err != nil {
				t.Errorf("%s: %v", id, err)
			}
		}
	}
	if _, err := found.describe(t, "c2"); !errdefs.IsNotFound(err) {
		t.Errorf("a container that went meanwhile: %v", err)
	}
	if _, err := h.find("gone"); !errdefs.IsNotFound(err) {
		t.Errorf("a sandbox that went meanwhile: %v", err)
	}
	h.expire()
	for _, n := range h.notes.list() {
		if n.ID == "gone" {
			t.Errorf("still noted: %+v", n)
		}
	}
}

// Notes of another boot, of another version and without meaning count for
// nothing.
func TestNotes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notes.json")
	log := slog.New(slog.DiscardHandler)
	n := openNotes(path, log)
	n.put(note{ID: "one", Host: "unix:/h", Relay: "unix:/r", CID: 3, Found: true})
	n.addContainer("one", containerNote{ID: "c", Reference: "app"})
	n.addContainer("one", containerNote{ID: "c", Reference: "app2"})
	n.addContainer("absent", containerNote{ID: "c"})
	n.dropContainer("absent", "c")
	again := openNotes(path, log)
	got := again.containers("one", place{host: "unix:/h", relay: "unix:/r", cid: 3, found: true})
	if len(again.list()) != 1 || len(got) != 1 || got[0].Reference != "app2" {
		t.Errorf("noted %+v", again.list())
	}
	if moved := again.containers("one", place{host: "unix:/h", relay: "unix:/r", cid: 4, found: true}); moved != nil {
		t.Errorf("containers of a sandbox elsewhere: %v", moved)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		"boot":    strings.ReplaceAll(string(good), bootID(), "2f0b3c9d-0000-0000-0000-000000000000"),
		"version": strings.ReplaceAll(string(good), `"version":1`, `"version":2`),
		"cut":     string(good[:len(good)/2]),
		"nothing": "",
	} {
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := openNotes(path, log).list(); len(got) != 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// A snapshot that lies on layers of another repository's image does not say what
// the container runs; a pod that names nothing, or an id, leaves it to it.
func TestImageOfSnapshot(t *testing.T) {
	const ref = "registry.example/app:v1"
	manifest := digest.FromString("app")
	known := images{"c": {Reference: ref, Manifest: manifest}}
	s := New(Config{Discovery: &Discovery{Containers: known}})
	for word, want := range map[string]string{
		"":                          ref,
		manifest.String():           ref,
		ref:                         ref,
		"registry.example/app:v2":   ref,
		"registry.example/other:v1": "registry.example/other:v1",
		"docker.io/library/app:v1":  "docker.io/library/app:v1",
	} {
		got, err := s.imageOf(t.Context(), kata.Container{ID: "c", Image: word})
		if err != nil || got.Reference != want || (got.Manifest == manifest) != (want == ref) {
			t.Errorf("%q: %+v, %v, want %s", word, got, err, want)
		}
	}
}
