package criproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/tatami-containers/tatami/host/class"
	"github.com/tatami-containers/tatami/host/pods"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

const (
	// maxMessage bounds a message in bytes, as the kubelet and containerd do
	// (kubernetes pkg/kubelet/util, maxMsgSize; containerd defaults).
	maxMessage = 16 << 20
	// stopGrace is how long calls under way may take when a proxy ends.
	stopGrace = 10 * time.Second
	// sweepEvery is how often it is looked which images containerd still has, beside
	// after each RemoveImage.
	sweepEvery = 10 * time.Minute
	// listTimeout bounds that look.
	listTimeout = time.Minute
	// redial is how long containerd is away at most before it is tried again.
	redial = 3 * time.Second
)

// Config of a Proxy.
type Config struct {
	Containerd string // path of its socket
	Keys       *Keys
	Pulls      *class.Pulls // is told of pulls for pods; may be nil
	Log        *slog.Logger
}

// Proxy passes calls of CRI on.
type Proxy struct {
	keys  *Keys
	pulls *class.Pulls
	log   *slog.Logger
	conn  *grpc.ClientConn
	// removed has an element after an image was removed.
	removed chan struct{}
}

// New returns a Proxy. containerd need not be there yet: until then calls fail as
// they would without the proxy.
func New(cfg Config) (*Proxy, error) {
	wait := backoff.DefaultConfig
	wait.MaxDelay = redial
	conn, err := grpc.NewClient("unix:"+cfg.Containerd,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: wait, MinConnectTimeout: redial}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("image service of containerd at %s: %w", cfg.Containerd, err)
	}
	return &Proxy{keys: cfg.Keys, pulls: cfg.Pulls, log: cfg.Log, conn: conn, removed: make(chan struct{}, 1)}, nil
}

// Close ends the connection to containerd. Serve has returned.
func (p *Proxy) Close() error { return p.conn.Close() }

// Serve answers on a listener until ctx ends. Calls under way are broken off after a
// while; the kubelet asks again.
func (p *Proxy) Serve(ctx context.Context, l net.Listener) error {
	server := grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(p.handle),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	sweeping, stopped := make(chan struct{}), make(chan struct{})
	sweep, endSweep := context.WithCancel(ctx)
	go func() { defer close(sweeping); p.sweeps(sweep) }()
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		force := time.AfterFunc(stopGrace, server.Stop)
		defer force.Stop()
		server.GracefulStop()
	})
	err := server.Serve(l)
	if !stop() { // ctx has ended
		<-stopped
	}
	endSweep()
	<-sweeping
	if err != nil {
		return fmt.Errorf("serve the image service of CRI: %w", err)
	}
	return nil
}

// handle passes one call of any method on, in both directions until both ends are
// done.
func (p *Proxy) handle(_ any, in grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(in)
	if !ok {
		return errors.New("a call without a method")
	}
	var first frame
	if err := in.RecvMsg(&first); err != nil && !errors.Is(err, io.EOF) {
		return err
	} else if err != nil {
		return p.forward(in, method, nil)
	}
	end := p.begin(method, first)
	err := p.forward(in, method, &first)
	end(err)
	return err
}

// begin looks at the first message of a call, and returns what is to be done when it
// has ended.
func (p *Proxy) begin(method string, first frame) (end func(error)) {
	switch method {
	case cri.ImageService_PullImage_FullMethodName:
		var req cri.PullImageRequest
		if proto.Unmarshal(first, &req) == nil { // else containerd says so
			login, pod := p.login(&req), p.pod(&req)
			return func(err error) {
				login(err)
				pod()
			}
		}
	case cri.ImageService_RemoveImage_FullMethodName:
		return func(err error) {
			if err != nil {
				return
			}
			select {
			case p.removed <- struct{}{}:
			default:
			}
		}
	}
	return func(error) {}
}

// pod notes for which pod a pull is, until it ends.
func (p *Proxy) pod(req *cri.PullImageRequest) (end func()) {
	uid, facts, ok := pods.OfPull(req)
	if p.pulls == nil || !ok {
		return func() {}
	}
	return p.pulls.Begin(req.GetImage().GetImage(), class.Pull{Pod: uid, Facts: facts})
}

// login notes the credential of a pull.
func (p *Proxy) login(req *cri.PullImageRequest) (end func(error)) {
	a := req.GetAuth()
	login := credentials.Login{
		Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(),
		IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
	repository := repositoryOf(req.GetImage().GetImage())
	if login == (credentials.Login{}) || repository == "" {
		return func(error) {}
	}
	cred, err := login.Credential()
	if err != nil {
		p.log.Warn("a pull came with credentials that cannot be decoded: its auth is not base64 of user:password", "repository", repository)
		return func(error) {}
	}
	return p.keys.begin(repository, &key{server: serverOf(a.GetServerAddress()), cred: cred})
}

// sweeps forgets what is not needed any more until ctx ends.
func (p *Proxy) sweeps(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.removed:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := p.sweep(ctx); err != nil && ctx.Err() == nil {
			p.log.Warn("credentials of removed images stay in memory for now", "error", err)
		}
	}
}

// sweep forgets the credentials of repositories of which containerd has no image.
func (p *Proxy) sweep(ctx context.Context) error {
	at, ok := p.keys.now()
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	list, err := cri.NewImageServiceClient(p.conn).ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return fmt.Errorf("list containerd's images: %w", err)
	}
	present := map[string]bool{}
	for _, image := range list.GetImages() {
		for _, ref := range append(image.GetRepoTags(), image.GetRepoDigests()...) {
			present[repositoryOf(ref)] = true
		}
	}
	p.keys.retain(present, at)
	return nil
}

// forward makes the call at containerd. Metadata, messages, trailer and status are
// the same on both sides, and the deadline is the caller's.
func (p *Proxy) forward(in grpc.ServerStream, method string, first *frame) error {
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md.Copy())
	}
	out, err := p.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(raw{}))
	if err != nil {
		return err
	}
	go func() { // ends with the call, when in.RecvMsg fails
		if err := send(in, out, first); err != nil {
			cancel()
		}
	}()
	return receive(in, out)
}

// send passes the caller's messages on; the error is nil when it has no more, or when
// containerd takes no more, whose status then counts.
func send(in grpc.ServerStream, out grpc.ClientStream, first *frame) error {
	for msg := first; msg != nil; {
		if err := out.SendMsg(msg); err != nil {
			return nil //nolint:nilerr // receive gets the reason
		}
		err := in.RecvMsg(msg)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	return out.CloseSend()
}

// receive passes containerd's answer back; its error is the status of the call.
func receive(in grpc.ServerStream, out grpc.ClientStream) error {
	header, err := out.Header()
	if err == nil && header != nil {
		err = in.SetHeader(header)
	}
	for err == nil {
		var msg frame
		if err = out.RecvMsg(&msg); err == nil {
			err = in.SendMsg(&msg)
		}
	}
	in.SetTrailer(out.Trailer())
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
