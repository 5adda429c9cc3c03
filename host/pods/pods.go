// Package pods asks containerd, by the Kubernetes Container Runtime Interface, what
// the kubelet said of a pod.
package pods

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/host/class"
)

const (
	// patience bounds one question, while containerd is started again, too: a container
	// waits for the answer.
	patience = 2 * time.Second
	// redial is how long it is waited at most before containerd is tried again.
	redial = patience / 4
	// maxMessage bounds an answer in bytes, as the kubelet does (kubernetes
	// pkg/kubelet/util, maxMsgSize).
	maxMessage = 16 << 20
)

// Pods are those that containerd runs for the kubelet.
type Pods struct {
	conn     *grpc.ClientConn
	log      *slog.Logger
	patience time.Duration
	silent   atomic.Bool // containerd did not answer last time
}

// New asks the containerd at this socket, which need not be there yet.
func New(socket string, log *slog.Logger) (*Pods, error) {
	wait := backoff.Config{BaseDelay: redial, Multiplier: 1, MaxDelay: redial}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: wait, MinConnectTimeout: patience}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.WaitForReady(true)))
	if err != nil {
		return nil, fmt.Errorf("runtime service of containerd at %s: %w", socket, err)
	}
	return &Pods{conn: conn, log: log, patience: patience}, nil
}

// Close ends the connection.
func (p *Pods) Close() error { return p.conn.Close() }

// Facts returns what is known of the pod with this sandbox. ErrNotFound when
// containerd has none of the kubelet's of this id, ErrUnavailable when it does not
// say; that is logged when it begins and when it is over.
func (p *Pods) Facts(ctx context.Context, sandbox string) (class.Facts, error) {
	ctx, cancel := context.WithTimeout(ctx, p.patience)
	defer cancel()
	resp, err := cri.NewRuntimeServiceClient(p.conn).PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: sandbox})
	// Unimplemented: its CRI plugin is off.
	if code := status.Code(err); code == codes.NotFound || code == codes.Unimplemented {
		p.silent.Store(false)
		return class.Facts{}, fmt.Errorf("sandbox %s is no pod of containerd's: %w", sandbox, errdefs.ErrNotFound)
	}
	if was := p.silent.Swap(err != nil); was != (err != nil) {
		p.tell(err)
	}
	if err != nil {
		return class.Facts{}, fmt.Errorf("ask containerd of sandbox %s: %w: %w", sandbox, errdefs.ErrUnavailable, err)
	}
	s := resp.GetStatus()
	if s.GetId() != sandbox { // containerd takes the beginning of an id for the whole (CRI plugin, sandboxstore)
		return class.Facts{}, fmt.Errorf("sandbox %s is no pod of containerd's, as %.64s is: %w", sandbox, s.GetId(), errdefs.ErrNotFound)
	}
	return class.Facts{
		Labels: s.GetLabels(), Annotations: s.GetAnnotations(),
		Namespace: s.GetMetadata().GetNamespace(), Runtime: s.GetRuntimeHandler(),
	}, nil
}

func (p *Pods) tell(err error) {
	if err == nil {
		p.log.Info("containerd tells of pods again")
		return
	}
	p.log.Warn("containerd does not tell of pods: classes of containers come from their bundles until it does", "error", err)
}

// OfPull returns what a pull says of the pod that it is for, and the pod's UID; ok is
// false when it is for none.
func OfPull(req *cri.PullImageRequest) (uid string, f class.Facts, ok bool) {
	pod := req.GetSandboxConfig()
	uid = pod.GetMetadata().GetUid()
	return uid, class.Facts{
		Labels: pod.GetLabels(), Annotations: pod.GetAnnotations(), Namespace: pod.GetMetadata().GetNamespace(),
		Runtime: req.GetImage().GetRuntimeHandler(), QoS: class.QoSOf(pod.GetLinux().GetCgroupParent()),
	}, pod != nil
}
