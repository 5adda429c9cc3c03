package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/tatami-containers/tatami/host/class"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// cri answers as containerd does; tests/containerd asks that itself.
type cri map[string]class.Facts

func (c cri) Facts(_ context.Context, sandbox string) (class.Facts, error) {
	f, ok := c[sandbox]
	switch {
	case sandbox == "silent":
		return f, fmt.Errorf("containerd: %w", errdefs.ErrUnavailable)
	case !ok:
		return f, fmt.Errorf("sandbox %s: %w", sandbox, errdefs.ErrNotFound)
	}
	return f, nil
}

// run makes the bundle of a container in a cgroup.
func (h *host) run(t *testing.T, id, sandbox, image, cgroup string) {
	t.Helper()
	dir := filepath.Join(h.state, "io.containerd.runtime.v2.task", "k8s.io", id)
	spec, err := json.Marshal(specs.Spec{Version: specs.Version, Annotations: map[string]string{
		"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": sandbox, "io.kubernetes.cri.image-name": image,
	}, Linux: &specs.Linux{CgroupsPath: cgroup}})
	if err = errors.Join(err, os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "config.json"), spec, 0o600)); err != nil {
		t.Fatal(err)
	}
}

// A container's class comes from the pod, then from the bundle, and is the same after
// a restart; the status says why.
func TestClassOfFound(t *testing.T) {
	h := newHost(t, images{"jobs": {Snapshotter: "tatami-jobs"}})
	h.push("app:v1", map[string]string{"a": "x"})
	image := h.ref("app:v1")
	h.cfg.Discovery.Containers.(images)["jobs"] = Image{Reference: image, Snapshotter: "tatami-jobs"}
	rules, err := class.New([]class.Class{{Name: class.Online}, {Name: class.Batch, Match: []string{"snapshotter=tatami-jobs"}}}, class.Online)
	if err != nil {
		t.Fatal(err)
	}
	h.cfg.Rules = rules
	h.cfg.Discovery.Pods = cri{"labelled": {Labels: map[string]string{"koordinator.sh/qosClass": "BE"}}, "plain": {Namespace: "x"}}
	const bestEffort = "kubepods-besteffort-pod1.slice:cri-containerd:c"
	for sandbox, want := range map[string]class.Choice{
		"labelled": {Class: class.Batch, Reason: "label koordinator.sh/qosClass=BE"},
		"plain":    {Class: class.Online, Reason: "default class"},
		"silent":   {Class: class.Batch, Reason: "Kubernetes QoS BestEffort (labels and runtime handler of the pod are not known)"},
		"nerdctl":  {Class: class.Batch, Reason: "snapshotter tatami-jobs"},
	} {
		v, _ := h.vmm(t, sandbox)
		id := sandbox
		if sandbox == "nerdctl" {
			id = "jobs"
		}
		h.run(t, id, sandbox, image, map[string]string{"silent": bestEffort}[sandbox])
		if d, err := v.describe(t, id); err != nil || d.Class != want.Class {
			t.Errorf("%s: %v, %v, want %+v", sandbox, d, err, want)
		}
		box, err := h.find(sandbox)
		if err != nil {
			t.Fatal(err)
		}
		if c := box.status().Containers[0]; c.Class != want.Class || c.ClassReason != want.Reason {
			t.Errorf("%s: the status says %s: %s, want %+v", sandbox, c.Class, c.ClassReason, want)
		}
	}
	if got := h.containersOf(); got[class.Batch] != 3 || got[class.Online] != 1 {
		t.Errorf("containers of classes: %v", got)
	}
	noted := map[string]class.Choice{}
	for _, n := range h.notes.list() {
		for _, c := range n.Containers {
			noted[c.ID] = h.noted(c)
		}
	}
	if len(noted) != 4 || noted["labelled"] != (class.Choice{Class: class.Batch, Reason: "label koordinator.sh/qosClass=BE"}) {
		t.Errorf("the next process knows %+v", noted)
	}
	if c := h.noted(containerNote{Class: "gone"}); c.Class != class.Online || !strings.Contains(c.Reason, "no class gone any more") {
		t.Errorf("a class that went: %+v", c)
	}
}

// Who adds a container by hand may say any class of the settings.
func TestClassSaid(t *testing.T) {
	g := newRig(t)
	g.push("app:v1", map[string]string{"a": "x"})
	rules, err := class.New([]class.Class{{Name: class.Online}, {Name: "mid"}, {Name: class.Batch}}, "mid")
	if err != nil {
		t.Fatal(err)
	}
	g.Service.cfg.Rules = rules
	g.attach(t, "one")
	for name, want := range map[string]class.Choice{"": {Class: "mid", Reason: "default class"}, class.Batch: {Class: class.Batch, Reason: "said by hand"}} {
		if _, err := g.AddContainer(t.Context(), &api.AddContainerRequest{Sandbox: "one", ContainerId: "c" + name, Reference: g.ref("app:v1"), Class: name}); err != nil {
			t.Fatal(err)
		}
		box, err := g.find("one")
		if err != nil {
			t.Fatal(err)
		}
		if c, _ := box.container("c" + name); c.class != want {
			t.Errorf("%q: %+v, want %+v", name, c.class, want)
		}
	}
}

// What is fetched for an image that somebody has prepared is charged to the class that
// he says.
func TestClassOfPrepare(t *testing.T) {
	turns, err := sched.New(sched.Config{Default: class.Online, Classes: []sched.Class{{Name: class.Online, Share: 95}, {Name: class.Batch, Share: 5}}})
	if err != nil {
		t.Fatal(err)
	}
	g := newScheduled(t, turns)
	g.push("app:v1", map[string]string{"a": "x"})
	if _, err := g.Prepare(t.Context(), &api.PrepareRequest{Reference: g.ref("app:v1"), Class: "no such"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("of a class that there is not: %v", err)
	}
	if _, err := g.Prepare(t.Context(), &api.PrepareRequest{Reference: g.ref("app:v1"), Class: class.Batch}); err != nil {
		t.Fatal(err)
	}
	for _, q := range turns.Status().Queues {
		if q.Name != g.reg.Host() {
			continue
		}
		if on, batch := q.Classes[0].Total, q.Classes[1].Total; on != 0 || batch == 0 {
			t.Errorf("%d bytes are charged to online, %d to batch", on, batch)
		}
		return
	}
	t.Errorf("the registry has no queue: %+v", turns.Status())
}

// The status has classes as they are set, and the queues.
func TestScheduleStatus(t *testing.T) {
	cfg := sched.Config{Default: class.Online, Classes: []sched.Class{
		{Name: class.Online, Share: 60, Floor: sched.Rate{Percent: 12.5}, Fill: true},
		{Name: class.Batch, Share: 20, Ceiling: sched.Rate{Bytes: 50e6}},
	}}
	turns, err := sched.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t)
	g.Service.cfg.Sched, g.Service.cfg.Schedule = turns, cfg
	turns.Upstream("bad\xffname") // of a redirect
	got := g.Service.schedule()
	if _, err := proto.Marshal(got); err != nil {
		t.Error(err)
	}
	if !got.Enabled || len(got.Classes) != 2 {
		t.Fatalf("%v", got)
	}
	if c := got.Classes[0]; c.Name != class.Online || c.Percent != 75 || c.Floor != "12.5%" || c.Ceiling != "" || c.Fill != "full" {
		t.Errorf("%v", c)
	}
	if c := got.Classes[1]; c.Name != class.Batch || c.Percent != 25 || c.Ceiling != "50 MB/s" || c.Fill != "none" {
		t.Errorf("%v", c)
	}
	for _, q := range got.Queues {
		if len(q.Classes) != 2 {
			t.Errorf("queue %s has %d classes", q.Name, len(q.Classes))
		}
	}
}
