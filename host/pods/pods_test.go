package pods

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tatami-containers/tatami/host/class"
)

// runtime answers as containerd does; tests/containerd asks that itself.
type runtime struct {
	cri.UnimplementedRuntimeServiceServer
	err error
}

func (r *runtime) PodSandboxStatus(_ context.Context, req *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	if r.err != nil {
		return nil, r.err
	}
	if !strings.HasPrefix("pod", req.PodSandboxId) { // as containerd's index of ids has it
		return nil, status.Error(codes.NotFound, "no such sandbox")
	}
	return &cri.PodSandboxStatusResponse{Status: &cri.PodSandboxStatus{
		Id: "pod", Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"},
		Metadata: &cri.PodSandboxMetadata{Namespace: "jobs"}, RuntimeHandler: "kata",
	}}, nil
}

func TestFacts(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	var log bytes.Buffer
	p, err := New(socket, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.patience = 10 * time.Millisecond
	for range 2 {
		if _, err := p.Facts(t.Context(), "pod"); !errdefs.IsUnavailable(err) {
			t.Errorf("without containerd: %v", err)
		}
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server, r := grpc.NewServer(), new(runtime)
	cri.RegisterRuntimeServiceServer(server, r)
	go func() { _ = server.Serve(l) }() // ends with Stop
	defer server.Stop()
	p.patience = time.Minute
	want := class.Facts{Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"}, Namespace: "jobs", Runtime: "kata"}
	for range 2 {
		if got, err := p.Facts(t.Context(), "pod"); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v", got, err)
		}
	}
	for _, none := range []string{"other", "po"} {
		if _, err := p.Facts(t.Context(), none); !errdefs.IsNotFound(err) {
			t.Errorf("no pod %s: %v", none, err)
		}
	}
	r.err = status.Error(codes.Unimplemented, "no such service")
	if _, err := p.Facts(t.Context(), "pod"); !errdefs.IsNotFound(err) {
		t.Errorf("no CRI: %v", err)
	}
	r.err = status.Error(codes.Internal, "broken")
	if _, err := p.Facts(t.Context(), "pod"); !errdefs.IsUnavailable(err) {
		t.Errorf("broken CRI: %v", err)
	}
	if got := log.String(); strings.Count(got, "does not tell") != 2 || strings.Count(got, "tells of pods again") != 1 {
		t.Errorf("logged:\n%s", got)
	}
}

func TestOfPull(t *testing.T) {
	if _, _, ok := OfPull(&cri.PullImageRequest{Image: &cri.ImageSpec{Image: "x"}}); ok {
		t.Error("a pull for no pod is for one")
	}
	uid, f, ok := OfPull(&cri.PullImageRequest{
		Image: &cri.ImageSpec{Image: "x", RuntimeHandler: "kata"},
		SandboxConfig: &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Uid: "u", Namespace: "jobs"}, Labels: map[string]string{"a": "b"},
			Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podu.slice"},
		},
	})
	want := class.Facts{Labels: map[string]string{"a": "b"}, Namespace: "jobs", Runtime: "kata", QoS: class.BestEffort}
	if !ok || uid != "u" || !reflect.DeepEqual(f, want) {
		t.Errorf("%q, %+v, %v", uid, f, ok)
	}
}
