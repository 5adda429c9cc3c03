package class

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// standard are the classes of a node without settings, and one between them.
func standard(t *testing.T, online, mid, batch []string) *Rules {
	t.Helper()
	r, err := New([]Class{{Online, online}, {"mid", mid}, {Batch, batch}}, Online)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestChoose(t *testing.T) {
	label := func(kv ...string) Facts {
		f := Facts{Labels: map[string]string{}}
		for i := 0; i < len(kv); i += 2 {
			f.Labels[kv[i]] = kv[i+1]
		}
		return f
	}
	with := func(f Facts, change func(*Facts)) Facts { change(&f); return f }
	const qos, prio = "koordinator.sh/qosClass", "koordinator.sh/priority-class"
	for _, tc := range []struct {
		name               string
		online, mid, batch []string
		facts              Facts
		want, why          string
	}{
		{name: "nothing", want: Online, why: "default class"},
		{name: "LSE", facts: label(qos, "LSE"), want: Online, why: "label koordinator.sh/qosClass=LSE"},
		{name: "LSR", facts: label(qos, "LSR"), want: Online, why: "label koordinator.sh/qosClass=LSR"},
		{name: "LS", facts: label(qos, "LS"), want: Online, why: "label koordinator.sh/qosClass=LS"},
		{name: "SYSTEM", facts: label(qos, "SYSTEM"), want: Online, why: "label koordinator.sh/qosClass=SYSTEM"},
		{name: "BE", facts: label(qos, "BE"), want: Batch, why: "label koordinator.sh/qosClass=BE"},
		{name: "no class of Koordinator", facts: label(qos, "be"), want: Online, why: "default class"},
		{name: "prod", facts: label(prio, "koord-prod"), want: Online, why: "label koordinator.sh/priority-class=koord-prod"},
		{name: "mid priority", facts: label(prio, "koord-mid"), want: Batch, why: "label koordinator.sh/priority-class=koord-mid"},
		{name: "batch priority", facts: label(prio, "koord-batch"), want: Batch, why: "label koordinator.sh/priority-class=koord-batch"},
		{name: "free priority", facts: label(prio, "koord-free"), want: Batch, why: "label koordinator.sh/priority-class=koord-free"},
		{name: "QoS class before priority", facts: label(prio, "koord-prod", qos, "BE"), want: Batch, why: "label koordinator.sh/qosClass=BE"},
		{name: "annotation", facts: Facts{Annotations: map[string]string{qos: "BE"}}, want: Batch, why: "annotation koordinator.sh/qosClass=BE"},
		{name: "Guaranteed", facts: Facts{QoS: Guaranteed}, want: Online, why: "Kubernetes QoS Guaranteed"},
		{name: "Burstable", facts: Facts{QoS: Burstable}, want: Online, why: "Kubernetes QoS Burstable"},
		{name: "BestEffort", facts: Facts{QoS: BestEffort}, want: Batch, why: "Kubernetes QoS BestEffort"},
		{name: "label before QoS", facts: with(label(qos, "LS"), func(f *Facts) { f.QoS = BestEffort }), want: Online, why: "label koordinator.sh/qosClass=LS"},
		{name: "settings before QoS", online: []string{"qos=BestEffort"}, facts: Facts{QoS: BestEffort}, want: Online, why: "Kubernetes QoS BestEffort"},
		{name: "settings before Koordinator", mid: []string{prio + "=koord-mid"}, facts: label(prio, "koord-mid"), want: "mid", why: "label koordinator.sh/priority-class=koord-mid"},
		{name: "runtime", batch: []string{"runtime=kata-batch"}, facts: Facts{Runtime: "kata-batch", QoS: Guaranteed}, want: Batch, why: "runtime handler kata-batch"},
		{name: "another runtime", batch: []string{"runtime=kata-batch"}, facts: Facts{Runtime: "kata"}, want: Online, why: "default class"},
		{name: "label before runtime", batch: []string{"runtime=kata-batch"}, facts: with(label(qos, "LS"), func(f *Facts) { f.Runtime = "kata-batch" }), want: Online, why: "label koordinator.sh/qosClass=LS"},
		{name: "snapshotter", batch: []string{"snapshotter=jobs"}, facts: Facts{Snapshotter: "jobs"}, want: Batch, why: "snapshotter jobs"},
		{name: "namespace", batch: []string{"namespace=train-*"}, facts: Facts{Namespace: "train-7"}, want: Batch, why: "namespace train-7"},
		{name: "not known is no value", batch: []string{"namespace=*"}, want: Online, why: "default class"},
		{name: "jobs", mid: []string{"batch.kubernetes.io/job-name=*"}, facts: label("batch.kubernetes.io/job-name", "x"), want: "mid", why: "label batch.kubernetes.io/job-name=x"},
		{name: "the more important class", mid: []string{"a=1"}, batch: []string{"b=2"}, facts: label("a", "1", "b", "2"), want: "mid", why: "label a=1"},
		{name: "long", mid: []string{"a=*"}, facts: label("a", strings.Repeat("x", 1000)), want: "mid", why: "label a=" + strings.Repeat("x", 64)},
		{name: "incomplete", facts: Facts{QoS: BestEffort, Incomplete: true}, want: Batch, why: "Kubernetes QoS BestEffort (labels and runtime handler of the pod are not known)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := standard(t, tc.online, tc.mid, tc.batch).Choose(tc.facts); got != (Choice{tc.want, tc.why}) {
				t.Errorf("%+v, want %s: %s", got, tc.want, tc.why)
			}
		})
	}
}

func TestParseRule(t *testing.T) {
	for text, ok := range map[string]bool{
		"koordinator.sh/qosClass=BE": true, "qos=BestEffort": true, "a=": true, "a=b=c": true, "runtime=*": true,
		"": false, "a": false, "=b": false, "qos=BE": false, "qos=*": false, "a = b": false, "a=" + strings.Repeat("x", maxRule): false,
	} {
		if _, err := ParseRule(text); (err == nil) != ok || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.64q: %v", text, err)
		}
	}
	if _, err := New([]Class{{Online, []string{"x"}}}, Online); err == nil || !strings.Contains(err.Error(), "class online") {
		t.Errorf("a rule without a value: %v", err)
	}
	if _, err := New([]Class{{Name: Online}}, "bulk"); err == nil || !strings.Contains(err.Error(), "give one of online") {
		t.Errorf("a default that is no class: %v", err)
	}
}

// Paths as the kubelet and containerd make them, with both drivers.
func TestQoSOf(t *testing.T) {
	const uid = "6f2c1d2e-0f4e-4d5c-a6b0-2d7c5d1a0b11"
	for path, want := range map[string]string{
		"/kubepods/besteffort/pod" + uid + "/c1":                                        BestEffort,
		"/kubepods/burstable/pod" + uid:                                                 Burstable,
		"/kubepods/pod" + uid + "/c1":                                                   Guaranteed,
		"kubepods-besteffort-pod6f2c_1.slice:cri-containerd:c1":                         BestEffort,
		"kubepods-burstable-pod6f2c_1.slice:cri-containerd:c1":                          Burstable,
		"kubepods-pod6f2c_1.slice:cri-containerd:c1":                                    Guaranteed,
		"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod6f2c_1.slice": BestEffort,
		"/kubepods.slice/kubepods-pod6f2c_1.slice":                                      Guaranteed,
		"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice":        Burstable,
		"/kubelet/kubepods/besteffort/pod" + uid + "/c1":                                BestEffort,
		"": "", "/": "", "/default/c1": "", "kubepods": "", "/kubepods": "", "system.slice:x:kubepods-besteffort": "", "/k8s.io/kubepod/besteffort": "",
	} {
		if got := QoSOf(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func FuzzQoSOf(f *testing.F) {
	f.Add("/kubepods/besteffort/pod1")
	f.Add("kubepods-burstable-pod1.slice:cri-containerd:c")
	f.Add("kubepods")
	f.Fuzz(func(t *testing.T, path string) {
		if got := QoSOf(path); got != "" && !strings.Contains(path, "kubepods") {
			t.Errorf("%q: %s", path, got)
		}
	})
}

func TestWith(t *testing.T) {
	a := Facts{Labels: map[string]string{"a": "1", "b": "1"}, Runtime: "kata"}
	b := Facts{Labels: map[string]string{"b": "2", "c": "2"}, Runtime: "runc", QoS: Burstable, Incomplete: true}
	got := a.With(b)
	if len(got.Labels) != 3 || got.Labels["b"] != "1" || got.Runtime != "kata" || got.QoS != Burstable || !got.Incomplete || len(a.Labels) != 2 {
		t.Errorf("%+v", got)
	}
}

// Of two pods that pull the same image at a time, the more important one counts.
func TestPulls(t *testing.T) {
	r := standard(t, nil, nil, nil)
	var p Pulls
	choose := func(ref string) (out []Choice) {
		for _, pull := range p.Of(ref) {
			out = append(out, r.Choose(pull.Facts))
		}
		return out
	}
	endBatch := p.Begin("busybox", Pull{Facts: Facts{QoS: BestEffort}})
	if got := choose("docker.io/library/busybox:latest"); len(got) != 1 || got[0].Class != Batch {
		t.Errorf("%+v", got)
	}
	endOnline := p.Begin("docker.io/library/busybox:latest", Pull{Facts: Facts{QoS: Guaranteed}})
	if got := choose("busybox"); len(got) != 2 || !r.Before(got[1], got[0]) || r.Before(got[0], got[1]) {
		t.Errorf("%+v", got)
	}
	endOnline()
	endOnline()
	if got := choose("busybox"); len(got) != 1 || got[0].Class != Batch {
		t.Errorf("%+v", got)
	}
	endBatch()
	if len(p.by) != 0 || len(p.Of("sha256:x y")) != 0 {
		t.Errorf("%d references are remembered", len(p.by))
	}
}
