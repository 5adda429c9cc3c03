package service

import (
	"context"
	"errors"
	"net"

	"github.com/tatami-containers/tatami/host/metrics"
)

// values are what the node counts.
func (s *Service) values() metrics.Values {
	return metrics.Values{
		Node: s.cfg.Node.Stats(), Space: s.cfg.Node.Space(), Blobs: s.cfg.Node.Blobs().Stats(),
		Classes: s.cfg.Schedule.Classes, Queues: s.cfg.Sched.Status().Queues, Containers: s.containersOf(),
		Sandboxes: s.attached(), RelayBytes: s.sent.Load(),
	}
}

var errNotReady = errors.New("tatami-host starts or stops")

// healthy is an error unless the control socket and sandboxes are served.
func (s *Service) healthy() error {
	if !s.running.Load() {
		return errNotReady
	}
	return nil
}

// startMetrics answers Prometheus when the settings say so. Where it cannot listen,
// sandboxes are served all the same.
func (s *Service) startMetrics(ctx context.Context, address string) (stop func()) {
	if address == "" {
		return func() {}
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		s.log.Error("there are no metrics: is metrics.address in use?", "address", address, "error", err)
		return func() {}
	}
	m := metrics.New(s.values, s.healthy, s.log.With("part", "metrics"))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := m.Serve(l); err != nil {
			s.log.Error("metrics ended", "error", err)
		}
	}()
	s.log.Info("metrics are served", "address", l.Addr().String())
	return func() {
		_ = m.Close() // its listener and connections; nothing to add
		<-ended
	}
}
