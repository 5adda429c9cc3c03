package service

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/host/class"
	"github.com/tatami-containers/tatami/host/kata"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Pods knows what the kubelet said of a pod.
type Pods interface {
	// Facts are those of the pod with this sandbox; ErrNotFound when it is none.
	Facts(ctx context.Context, sandbox string) (class.Facts, error)
}

// standardRules are for a Service that has none: those of a node without settings.
func standardRules() *class.Rules {
	r, err := class.New([]class.Class{{Name: class.Online}, {Name: class.Batch}}, class.Online)
	if err != nil {
		panic(fmt.Sprintf("the classes of every node: %v", err))
	}
	return r
}

// Classes choose those of containers that containerd runs, and whose turn it is.
type Classes struct {
	Rules *class.Rules
	Sched *sched.Scheduler
	Pods  Pods // nil when nobody knows
}

// Of chooses the class of a container, which has its image from a snapshotter; that may
// be "". It stays what it is then: a class that changes under a running container would
// be hard to explain. What containerd does not say is left to the container's bundle.
func (k Classes) Of(ctx context.Context, c kata.Container, snapshotter string) class.Choice {
	facts := class.Facts{Snapshotter: snapshotter}
	if k.Pods != nil {
		pod, err := k.Pods.Facts(ctx, c.Sandbox)
		pod.Incomplete = err != nil && !errdefs.IsNotFound(err)
		facts = facts.With(pod)
	}
	if c.Pod != nil {
		facts = facts.With(*c.Pod)
	}
	return k.Rules.Choose(facts)
}

func (s *Service) classOf(ctx context.Context, c kata.Container, snapshotter string) class.Choice {
	return Classes{Rules: s.cfg.Rules, Pods: s.cfg.Discovery.Pods}.Of(ctx, c, snapshotter)
}

// said is the class of a container or an image that somebody says by hand.
func (s *Service) said(name string) (class.Choice, error) {
	if name == "" {
		return s.cfg.Rules.Choose(class.Facts{}), nil
	}
	return class.Choice{Class: name, Reason: "said by hand"}, s.cfg.Rules.Check(name)
}

// noted is the class that the process before this one chose, if there still is one.
func (s *Service) noted(n containerNote) class.Choice {
	if s.cfg.Rules.Check(n.Class) == nil {
		return class.Choice{Class: n.Class, Reason: n.Reason}
	}
	return class.Choice{Class: s.cfg.Rules.Default(), Reason: fmt.Sprintf("default class (the settings have no class %.32s any more)", n.Class)}
}

// flow is that of a container's reads: those of a sandbox in one class share one.
func (b *sandbox) flow(c class.Choice) *sched.Flow { return b.s.cfg.Sched.Flow(c.Class, b.id) }

// working is ctx for what somebody in a sandbox waits for.
func (b *sandbox) working(ctx context.Context, c class.Choice) context.Context {
	return sched.With(ctx, sched.NewWork(sched.Standing{Flow: b.flow(c), Rank: sched.Demand}))
}

// pulling is ctx for what somebody waits for who has an image prepared.
func (s *Service) pulling(ctx context.Context, ref string, c class.Choice) context.Context {
	return sched.With(ctx, sched.NewWork(sched.Standing{Flow: s.cfg.Sched.Flow(c.Class, "pull "+ref), Rank: sched.Demand}))
}
