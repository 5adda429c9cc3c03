package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

var (
	errDown   = fmt.Errorf("registry: %w", errdefs.ErrUnavailable)
	errStorm  = fmt.Errorf("registry: %w", errdefs.ErrResourceExhausted)
	errFull   = fmt.Errorf("%w: %w", unix.ENOSPC, errdefs.ErrResourceExhausted)
	errSecret = fmt.Errorf("registry: %w", errdefs.ErrUnauthenticated)
)

// The kubelet pulls again 10 s, 20 s, 40 s … after a pull that failed: when does it
// get the fallback?
func TestRefusals(t *testing.T) {
	type pull struct {
		after time.Duration
		err   error
		asked bool
		falls bool
	}
	for _, tc := range []struct {
		name  string
		pulls []pull
	}{
		{"no credentials", []pull{{0, errSecret, true, true}, {10 * time.Second, errSecret, false, true}, {time.Minute, errSecret, true, true}}},
		{"full disk", []pull{{0, errFull, true, true}}},
		{"an outage that passes", []pull{{0, errDown, true, false}, {10 * time.Second, errStorm, true, false}, {20 * time.Second, nil, true, false}, {time.Hour, errDown, true, false}}},
		{"an outage that stays", []pull{
			{0, errDown, true, false}, {10 * time.Second, errDown, true, false}, {20 * time.Second, errDown, true, false}, {40 * time.Second, errDown, true, false},
			{80 * time.Second, errDown, true, true}, {time.Second, errDown, false, true}, {5 * time.Minute, errDown, true, true},
		}},
		{"two outages", []pull{{0, errDown, true, false}, {time.Hour, errDown, true, false}}},
		{"an outage after a refusal", []pull{{0, errSecret, true, true}, {70 * time.Second, errDown, true, false}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var r refusals
				for n, p := range tc.pulls {
					time.Sleep(p.after)
					asked := false
					_, err := r.ask(t.Context(), use{"a", "b"}, func() ([]digest.Digest, error) { asked = true; return nil, p.err })
					if falls := errors.As(err, new(errLazy)); asked != p.asked || falls != p.falls || (err == nil) != (p.err == nil) {
						t.Errorf("pull %d: asked %v, falls back %v: %v", n, asked, falls, err)
					}
				}
			})
		})
	}
}

// A registry that fails fails the pull; the next one has the image lazily.
func TestRegistryDown(t *testing.T) {
	g := newRig(t, Guest)
	manifest := g.images.publish(t, "", tree{"a": "1"})
	g.images.before = func(context.Context) error { return errDown }
	_, err := g.tryPull(t.Context(), "k8s.io", ref, manifest)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "this may pass, pull again") {
		t.Error(err)
	}
	g.checkEmpty(t)
	g.images.before = func(context.Context) error { return nil }
	if p := g.pull(t, "k8s.io", ref, manifest); p.full != 0 {
		t.Errorf("%d layers were unpacked", p.full)
	}
}
