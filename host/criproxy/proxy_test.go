package criproxy

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// runtime is an image service that keeps names of images. tests/containerd has the
// same with containerd.
type runtime struct {
	cri.UnimplementedImageServiceServer
	t     *testing.T
	keys  *Keys
	pulls chan *cri.PullImageRequest // as they arrive
	end   chan error                 // of each pull

	mu     sync.Mutex
	images map[string]bool // protected by mu
	seen   metadata.MD     // of the last ImageStatus; protected by mu
	until  time.Time       // its deadline; protected by mu
}

func (r *runtime) PullImage(ctx context.Context, req *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	r.pulls <- req
	select {
	case err := <-r.end:
		if err != nil {
			return nil, err
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.images[req.GetImage().GetImage()] = true
	return &cri.PullImageResponse{ImageRef: "sha256:" + strings.Repeat("a", 64)}, nil
}

func (r *runtime) RemoveImage(_ context.Context, req *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.images, req.GetImage().GetImage())
	return &cri.RemoveImageResponse{}, nil
}

func (r *runtime) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	resp := &cri.ListImagesResponse{}
	for name := range r.images {
		resp.Images = append(resp.Images, &cri.Image{Id: "sha256:x", RepoTags: []string{name}})
	}
	return resp, nil
}

// ImageStatus answers with everything that a call can have.
func (r *runtime) ImageStatus(ctx context.Context, req *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen, _ = metadata.FromIncomingContext(ctx)
	r.until, _ = ctx.Deadline()
	check(r.t, grpc.SetHeader(ctx, metadata.Pairs("head", "h1", "bytes-bin", "\x00\xff")))
	check(r.t, grpc.SetTrailer(ctx, metadata.Pairs("tail", "t1")))
	if req.GetImage().GetImage() == "none" {
		st, err := status.New(codes.NotFound, "no such image").WithDetails(&cri.ImageSpec{Image: "why"})
		check(r.t, err)
		return nil, st.Err()
	}
	return &cri.ImageStatusResponse{Image: &cri.Image{Id: req.GetImage().GetImage()}, Info: map[string]string{"k": "v"}}, nil
}

func (r *runtime) StreamImages(_ *cri.StreamImagesRequest, out grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	for range 100 {
		if err := out.Send(&cri.StreamImagesResponse{Images: []*cri.Image{{Id: strings.Repeat("x", 1000)}}}); err != nil {
			return err
		}
	}
	return status.Error(codes.Aborted, "after all")
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func listen(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	check(t, err)
	return l
}

// start returns a runtime, and a client of the proxy before it.
func start(t *testing.T, log *slog.Logger) (*runtime, cri.ImageServiceClient, *grpc.ClientConn) {
	t.Helper()
	dir := t.TempDir()
	r := &runtime{t: t, keys: NewKeys(nil, log), pulls: make(chan *cri.PullImageRequest, 10), end: make(chan error), images: map[string]bool{}}
	backend := grpc.NewServer()
	cri.RegisterImageServiceServer(backend, r)
	l := listen(t, filepath.Join(dir, "c"))
	go backend.Serve(l) //nolint:errcheck // ends with Stop
	t.Cleanup(backend.Stop)
	p, err := New(Config{Containerd: filepath.Join(dir, "c"), Keys: r.keys, Log: log})
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	front := listen(t, filepath.Join(dir, "p"))
	go func() { ended <- p.Serve(ctx, front) }()
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "p"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	t.Cleanup(func() {
		check(t, conn.Close())
		cancel()
		check(t, <-ended)
		check(t, p.Close())
	})
	return r, cri.NewImageServiceClient(conn), conn
}

// Everything of a call arrives on both sides: messages, metadata, deadline, status
// with details, streams, and methods that this program does not know.
func TestTransparent(t *testing.T) {
	r, client, conn := start(t, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "ours", "1"), time.Hour)
	defer cancel()
	var head, tail metadata.MD
	resp, err := client.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: "x"}}, grpc.Header(&head), grpc.Trailer(&tail))
	check(t, err)
	want := &cri.ImageStatusResponse{Image: &cri.Image{Id: "x"}, Info: map[string]string{"k": "v"}}
	if !proto.Equal(resp, want) || strings.Join(head.Get("head"), "") != "h1" || strings.Join(head.Get("bytes-bin"), "") != "\x00\xff" || strings.Join(tail.Get("tail"), "") != "t1" {
		t.Errorf("%v, header %v, trailer %v", resp, head, tail)
	}
	if got := r.seen.Get("ours"); len(got) != 1 || got[0] != "1" {
		t.Errorf("metadata %v", r.seen)
	}
	if left := time.Until(r.until); left < 59*time.Minute || left > time.Hour {
		t.Errorf("%v are left of an hour", left)
	}
	_, err = client.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: "none"}})
	if st := status.Convert(err); st.Code() != codes.NotFound || st.Message() != "no such image" || len(st.Details()) != 1 {
		t.Errorf("status %v with %v", st, st.Details())
	}
	stream, err := client.StreamImages(ctx, &cri.StreamImagesRequest{})
	check(t, err)
	n := 0
	for {
		if _, err = stream.Recv(); err != nil {
			break
		}
		n++
	}
	if status.Code(err) != codes.Aborted || n != 100 {
		t.Errorf("%d messages, then %v", n, err)
	}
	err = conn.Invoke(ctx, "/runtime.v9.Other/Do", &cri.ImageSpec{}, &cri.ImageSpec{})
	if st := status.Convert(err); st.Code() != codes.Unimplemented || !strings.Contains(st.Message(), "runtime.v9.Other") {
		t.Errorf("an unknown method: %v", err)
	}
}

// find asks for credentials as the registry's client does.
func (r *runtime) find(repository, host string) auth.Credential {
	r.t.Helper()
	cred, err := r.keys.Credential(registry.WithLookup(r.t.Context(), &registry.Lookup{Repository: repository}), host)
	check(r.t, err)
	return cred
}

// pull pulls through the proxy; during is called while the runtime has it.
func (r *runtime) pull(client cri.ImageServiceClient, ref string, a *cri.AuthConfig, end error, during func()) {
	r.t.Helper()
	req := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: a}
	done := make(chan error, 1)
	go func() {
		_, err := client.PullImage(r.t.Context(), req)
		done <- err
	}()
	if got := <-r.pulls; !proto.Equal(got, req) {
		r.t.Errorf("the runtime got another request than was sent")
	}
	during()
	r.end <- end
	if err := <-done; status.Code(err) != status.Code(end) {
		r.t.Errorf("the pull ended with %v", err)
	}
}

// A credential counts while its pull is under way, and after it if that went well,
// until the image has gone.
func TestLife(t *testing.T) {
	var log bytes.Buffer
	r, client, _ := start(t, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	const host, repo = "reg.example:5000", "reg.example:5000/team/app"
	first, second := auth.Credential{Username: "u", Password: "canary1"}, auth.Credential{Username: "u", Password: "canary2"}
	expect := func(what string, want auth.Credential) {
		t.Helper()
		if got := r.find(repo, host); got != want {
			t.Errorf("%s: another credential counts than should", what)
		}
	}
	failed := status.Error(codes.Unknown, "denied")
	r.pull(client, repo+":1", &cri.AuthConfig{Username: "u", Password: "canary1"}, failed, func() { expect("while it is pulled", first) })
	expect("after a pull that failed", auth.EmptyCredential)
	r.pull(client, repo+":1", &cri.AuthConfig{Auth: "dTpjYW5hcnkx"}, nil, func() {})
	expect("after a pull", first)
	r.pull(client, repo+":2", &cri.AuthConfig{Username: "u", Password: "canary2"}, failed, func() { expect("while another is tried", second) })
	expect("after that failed", first)
	r.pull(client, repo+":2", &cri.AuthConfig{Username: "u", Password: "canary2"}, nil, func() {})
	expect("after a rotation", second)
	r.pull(client, repo+":3", nil, nil, func() {})
	expect("after a pull without", second)
	if got := r.find("reg.example:5000/team/other", host); got != auth.EmptyCredential {
		t.Error("another repository has the credential")
	}
	remove := func(ref string) {
		t.Helper()
		_, err := client.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
		check(t, err)
	}
	remove(repo + ":1")
	remove(repo + ":3")
	time.Sleep(100 * time.Millisecond) // time for what must not happen
	expect("while an image is left", second)
	remove(repo + ":2")
	for end := time.Now().Add(time.Minute); r.find(repo, host) != auth.EmptyCredential; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the credential outlives the last image")
		}
	}
	r.pull(client, repo+":1", &cri.AuthConfig{Auth: "canary3"}, nil, func() { expect("one that cannot be decoded", auth.EmptyCredential) })
	if s := log.String(); strings.Contains(s, "canary") || !strings.Contains(s, "cannot be decoded") {
		t.Errorf("logged %s", s)
	}
}

// A credential with a server is for that host only.
func TestServer(t *testing.T) {
	r, client, _ := start(t, slog.New(slog.DiscardHandler))
	for _, tc := range []struct {
		ref, server, repository, host string
		want                          bool
	}{
		{"debian", "https://index.docker.io/v1/", "docker.io/library/debian", "registry-1.docker.io", true},
		{"docker.io/library/a:1", "", "docker.io/library/a", "registry-1.docker.io", true},
		{"r.example/x", "https://r.example", "r.example/x", "r.example", true},
		{"r.example:5000/x@sha256:" + strings.Repeat("1", 64), "r.example:5000", "r.example:5000/x", "r.example:5000", true},
		{"r.example/y", "https://evil.example", "r.example/y", "r.example", false},
	} {
		r.pull(client, tc.ref, &cri.AuthConfig{Username: "u", Password: "p", ServerAddress: tc.server}, nil, func() {})
		if got := r.find(tc.repository, tc.host) != auth.EmptyCredential; got != tc.want {
			t.Errorf("%s for %s is found at %s: %v", tc.ref, tc.server, tc.host, got)
		}
	}
}

// FuzzPull looks at first messages of calls, whoever made them.
func FuzzPull(f *testing.F) {
	b, err := proto.Marshal(&cri.PullImageRequest{Image: &cri.ImageSpec{Image: "r.example/x:1"},
		Auth: &cri.AuthConfig{Auth: "dTpw", ServerAddress: "https://r.example/v2/"}, SandboxConfig: &cri.PodSandboxConfig{}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	f.Add([]byte{0x0a, 0x02, 0x0a, 0x00}, false)
	f.Fuzz(func(t *testing.T, b []byte, good bool) {
		p := &Proxy{keys: NewKeys(nil, slog.New(slog.DiscardHandler)), log: slog.New(slog.DiscardHandler)}
		var end error
		if !good {
			end = status.Error(codes.Unknown, "")
		}
		p.begin(cri.ImageService_PullImage_FullMethodName, b)(end)
		if !good && len(p.keys.known) > 0 {
			t.Error("a pull that failed is remembered")
		}
	})
}
