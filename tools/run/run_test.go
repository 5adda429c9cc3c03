package run

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

func TestOptions(t *testing.T) {
	for _, c := range []struct {
		name string
		o    Options
		want string // in the error; none when empty
	}{
		{"defaults", Options{Image: "x"}, ""},
		{"no image", Options{}, "no image"},
		{"place", Options{Image: "x", VM: "moon"}, "moon"},
		{"mode", Options{Image: "x", Mode: "half"}, "half"},
		{"accelerator", Options{Image: "x", Accel: "hax"}, "hax"},
		{"mount path", Options{Image: "x", MountPath: "nfs"}, "nfs"},
		{"memory", Options{Image: "x", MemoryMiB: 64}, "64 MiB"},
		{"processors", Options{Image: "x", CPUs: -1}, "-1 CPUs"},
		{"source", Options{Image: "x", Source: "nfs"}, "nfs"},
		{"virtio-fs without a machine", Options{Image: "x", VM: None, Source: SourceVirtioFS}, "no virtio-fs"},
		{"full pull over the relay", Options{Image: "x", Mode: Full, Source: SourceRelay}, "from the registry"},
		{"registry from nowhere", Options{Image: "x", Source: SourceRegistry}, "needs a registry"},
		{"full pull from nowhere", Options{Image: "x", Mode: Full}, "registry"},
	} {
		o := c.o.withDefaults()
		err := o.validate()
		if (err == nil) != (c.want == "") || err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestReport(t *testing.T) {
	r := &Report{Image: "x", Phases: []Phase{{"resolve", 0, 1}, {"mount", 9, 1}}, FirstExec: 9.5, Done: 10,
		CompressedSize: 100e6, Fetched: 25e6, Guest: &GuestReport{Hits: 3, VerifyFailures: 2, Sources: map[string]int64{"relay": 25e6}, Requests: map[string]int64{"relay": 7}}}
	var text, js bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"resolve", "first exec  9.50 s", "25.0 MB in all, of 100.0 MB (25.0 %)", "relay 25.0 MB in 7 requests", "2 chunks came wrong"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
	text.Reset()
	over := *r
	over.Source = "virtio-fs"
	if err := over.WriteText(&text); err != nil || !strings.Contains(text.String(), "node's image file over virtio-fs") || strings.Contains(text.String(), "requests") {
		t.Errorf("over virtio-fs: %v\n%s", err, text.String())
	}
	if err := r.WriteJSON(&js); err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(js.Bytes(), &back); err != nil || back.Fetched != r.Fetched || back.Guest.Sources["relay"] != 25e6 {
		t.Errorf("%+v, %v", back, err)
	}
}

// TestSignalBeforeTheContainer ends the run itself.
func TestSignalBeforeTheContainer(t *testing.T) {
	in := make(chan os.Signal, 1)
	s := &signals{in: in}
	ctx, stop := s.watch(t.Context())
	defer stop()
	in <- syscall.SIGUSR1 // nobody to have it
	in <- syscall.SIGTERM
	<-ctx.Done()
	if err := explain(ctx, ctx.Err()); !strings.Contains(err.Error(), "interrupted by terminated") {
		t.Errorf("cause %v", err)
	}
}
