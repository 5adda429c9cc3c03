package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/tatami-containers/tatami/guest/config"
	"github.com/tatami-containers/tatami/guest/runner"
	"github.com/tatami-containers/tatami/guest/service"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/rootfs/unpack"
)

// runnerGrace is how long containers may take to end once they are killed.
const runnerGrace = 10 * time.Second

// supervisor is the process that must not die.
type supervisor struct {
	cfg     *config.Config
	log     *slog.Logger
	sockets sockets
	servers []*server
	serving sync.WaitGroup
	runner  *runner.Runner // nil when it is off
}

// runSupervisor keeps a worker running until ctx ends, then undoes everything.
func runSupervisor(ctx context.Context, cfg *config.Config, args []string, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &supervisor{cfg: cfg, log: log}
	defer s.close()
	self, err := program()
	if err != nil {
		return err
	}
	// kata-agent looks for its socket once, soon after it has started us: that
	// comes before all that calls can wait for.
	if err := s.listen(ctx, cancel); err != nil {
		return err
	}
	log.Info("started", "version", version(), "listen", cfg.Listen)
	if err := notifyReady(); err != nil {
		log.Warn("tell the service manager", "error", err)
	}
	s.cleanUpEarlier()
	fuse, err := session.Open(session.Config{Dir: sessionDir(cfg), Log: log})
	if err != nil {
		return err
	}
	working, endWork := context.WithCancel(context.WithoutCancel(ctx))
	defer endWork()
	// Containers end before the file systems below them.
	context.AfterFunc(ctx, func() {
		defer endWork()
		s.endContainers()
	})
	err = session.Supervise(working, session.SuperviseConfig{
		Session: fuse, Command: append(append([]string{self}, args...), roleWorker),
		ExtraFiles: s.sockets.files, Restart: session.Hangups(working), Cleanup: s.cleanUp, Log: log,
	})
	log.Info("ended", "error", err)
	return err
}

// cleanUpEarlier removes what an earlier supervisor left.
func (s *supervisor) cleanUpEarlier() {
	if err := s.cleanUp(context.Background()); err != nil {
		s.log.Warn("clean up after an earlier tatami-guest", "error", err)
	}
}

func (s *supervisor) cleanUp(ctx context.Context) error {
	return errors.Join(mount.Clean(s.cfg.StateDir, s.log), unpack.Remove(ctx, unpackedDir(s.cfg)))
}

// listen opens all sockets, that of kata-agent when calls to it can reach the
// worker.
func (s *supervisor) listen(ctx context.Context, powerOff func()) error {
	if err := os.MkdirAll(s.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("make state_dir: %w", err)
	}
	for _, addr := range append([]string{"unix:" + workerSocket(s.cfg)}, s.cfg.Listen...) {
		if err := s.sockets.listenFor(addr); err != nil {
			return err
		}
	}
	if err := s.configureHub(); err != nil {
		return err
	}
	if s.cfg.CDHSocket != "" {
		if err := s.serveCDH(ctx); err != nil {
			return err
		}
	}
	if s.cfg.Runner {
		return s.serveRunner(ctx, powerOff)
	}
	return nil
}

// configureHub writes the configuration of the real Confidential Data Hub.
func (s *supervisor) configureHub() (err error) {
	if s.cfg.CDHForwardConfig == "" {
		return nil
	}
	var theirs []byte
	if s.cfg.CDHConfig != "" {
		if theirs, err = os.ReadFile(s.cfg.CDHConfig); err != nil {
			return fmt.Errorf("read the Confidential Data Hub's configuration: %w", err)
		}
	}
	out, err := config.HubConfig(s.cfg.CDHConfig, theirs, s.cfg.CDHForward, cmdline())
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.cfg.CDHForwardConfig), 0o755); err != nil { //nolint:gosec // of a file that is readable for its owner only
		return fmt.Errorf("write the Confidential Data Hub's configuration: %w", err)
	}
	if err := os.WriteFile(s.cfg.CDHForwardConfig, out, 0o600); err != nil {
		return fmt.Errorf("write the Confidential Data Hub's configuration: %w", err)
	}
	return nil
}

// serveCDH answers kata-agent here, because the agent connects once and never
// again.
func (s *supervisor) serveCDH(ctx context.Context) error {
	hub := &service.CDH{Guest: workerClient{"unix:" + workerSocket(s.cfg)}}
	if s.cfg.CDHForward != "" {
		hub.Forward = func(ctx context.Context) (*ttrpc.Client, error) { return dial(ctx, "unix:"+s.cfg.CDHForward) }
	}
	return s.serve(ctx, "unix:"+s.cfg.CDHSocket, hub.Register)
}

func (s *supervisor) serveRunner(ctx context.Context, powerOff func()) (err error) {
	s.runner, err = runner.New(runner.Config{Dir: runnerDir(s.cfg), Runtime: s.cfg.Runtime, PowerOff: powerOff, Log: s.log})
	if err != nil {
		return err
	}
	streams, err := s.sockets.listen(s.cfg.StreamListen)
	if err != nil {
		return err
	}
	s.serving.Go(func() {
		if err := s.runner.ServeStreams(ctx, streams); err != nil {
			s.log.Error("containers cannot be started any more", "error", err)
		}
	})
	return s.serve(ctx, "unix:"+runnerSocket(s.cfg), func(srv *ttrpc.Server) { api.RegisterRunnerService(srv, s.runner) })
}

// serve starts a ttrpc server in this process.
func (s *supervisor) serve(ctx context.Context, addr string, register func(*ttrpc.Server)) error {
	srv, err := newServer(s.log)
	if err != nil {
		return err
	}
	register(srv.Server)
	l, err := s.sockets.listen(addr)
	if err != nil {
		return err
	}
	s.servers = append(s.servers, srv)
	srv.start(context.WithoutCancel(ctx), l)
	return nil
}

func (s *supervisor) endContainers() {
	if s.runner == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), runnerGrace)
	defer cancel()
	if err := s.runner.Close(ctx); err != nil {
		s.log.Error("end containers", "error", err)
	}
}

func (s *supervisor) close() {
	for _, srv := range s.servers {
		srv.stop()
	}
	s.sockets.close()
	s.serving.Wait()
}
