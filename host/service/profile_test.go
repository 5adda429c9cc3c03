package service

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/profile"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/index"
)

// profileRig is a service that records starts, with a sandbox of one container.
func profileRig(t *testing.T) (g *rig, v *vm, segment index.Segment) {
	t.Helper()
	g = newRig(t)
	g.cfg.Profile = Profile{Record: time.Minute, Budget: 5 << 20}
	pushed := g.push("app:v1", map[string]string{"a": strings.Repeat("tatami ", 300_000), "b": strings.Repeat("x", 100_000)})
	v = g.attach(t, "one")
	g.addArgs(t, "c1", "/bin/app", "--password=secret")
	return g, v, fetchIndex(t, v.repo(t, g.ref("app")), pushed.Desc.Digest).Segments[0]
}

func (g *rig) addArgs(t *testing.T, container string, args ...string) {
	t.Helper()
	_, err := g.AddContainer(t.Context(), &api.AddContainerRequest{
		Sandbox: "one", ContainerId: container, Reference: g.ref("app:v1"), Args: args,
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (v *vm) record(t *testing.T, req *api.RecordStartRequest) error {
	t.Helper()
	_, err := v.RecordStart(t.Context(), req)
	return errgrpc.ToNative(err)
}

// chunkRange is chunk i of a segment as a range of the image.
func chunkRange(s index.Segment, i int) *api.Range {
	c := s.Table.Chunks[i]
	return &api.Range{Offset: s.Off + c.Off, Length: c.Len}
}

// What one container reported, the next one of the image is told of.
func TestRecordStart(t *testing.T) {
	g, v, s := profileRig(t)
	d, err := v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c1"})
	if err != nil || len(d.Profile) > 0 || d.RecordUs != time.Minute.Microseconds() || d.ProfileBudget != 5<<20 {
		t.Errorf("before any start: %v, %v", d, err)
	}
	third := chunkRange(s, 3)
	if err := v.record(t, &api.RecordStartRequest{ContainerId: "c1", Ranges: []*api.Range{third, chunkRange(s, 1)}}); err != nil {
		t.Fatal(err)
	}
	if err := v.record(t, &api.RecordStartRequest{ContainerId: "c1", Ranges: []*api.Range{chunkRange(s, 5)}}); err != nil {
		t.Errorf("a second report: %v", err)
	}
	g.addArgs(t, "c2", "/bin/other")
	if d, err = v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c2"}); err != nil || len(d.Profile) != 2 {
		t.Fatalf("after one start: %v, %v", d, err)
	}
	if d.Profile[0].Offset != chunkRange(s, 1).Offset || d.Profile[1].Offset != third.Offset || d.Profile[1].Length != third.Length {
		t.Errorf("told of %v", d.Profile) // by place, in so small a window
	}
	for range maxTold {
		if d, err = v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c2"}); err != nil {
			t.Fatal(err)
		}
	}
	if len(d.Profile) > 0 || d.Reference != g.ref("app:v1") {
		t.Errorf("a guest that asks without end is told %v", d)
	}
	list, err := g.ListProfiles(t.Context(), nil)
	if err != nil || len(list.Profiles) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	all, one := list.Profiles[0], list.Profiles[1]
	if all.Entrypoint != "" || all.Runs != 1 || all.Ranges != 2 || all.Source != "recorded" || all.Reference != g.ref("app:v1") ||
		one.Entrypoint != profile.Key([]string{"/bin/app", "--password=secret"}) || one.Command != "/bin/app" {
		t.Errorf("listed %v", list)
	}
	paths, err := g.ExportProfile(t.Context(), &api.ExportProfileRequest{Image: all.ManifestDigest, Entrypoint: one.Entrypoint})
	if err != nil || !strings.Contains(string(paths.Paths), "/a\n") {
		t.Errorf("exported %v, %v", paths, err)
	}
	outside := "../" + digest.Digest(all.ManifestDigest).Encoded() + "/profile-" + one.Entrypoint
	if _, err := g.ExportProfile(t.Context(), &api.ExportProfileRequest{Image: all.ManifestDigest, Entrypoint: "/../" + outside}); !errdefs.IsNotFound(err) {
		t.Errorf("an entrypoint that is a path: %v", err)
	}
	if _, err := g.RemoveProfile(t.Context(), &api.RemoveProfileRequest{Image: g.ref("app:v1")}); err != nil {
		t.Fatal(err)
	}
	if list, err = g.ListProfiles(t.Context(), nil); err != nil || len(list.Profiles) > 0 {
		t.Errorf("after removing: %v, %v", list, err)
	}
	if _, err := g.ExportProfile(t.Context(), &api.ExportProfileRequest{Image: g.ref("app:v1")}); !errdefs.IsNotFound(err) {
		t.Errorf("exported what is not there: %v", err)
	}
}

// What a container reads when it is ready is no part of its start.
func TestReady(t *testing.T) {
	g, v, s := profileRig(t)
	if _, err := v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.EndRecording(t.Context(), &api.EndRecordingRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.EndRecording(t.Context(), &api.EndRecordingRequest{ContainerId: "none"}); !errdefs.IsNotFound(err) {
		t.Errorf("a container that there is not: %v", err)
	}
	if err := v.record(t, &api.RecordStartRequest{
		ContainerId: "c1", Ranges: []*api.Range{chunkRange(s, 0), chunkRange(s, 4)}, AfterMs: []uint32{0, 1 << 30},
	}); err != nil {
		t.Fatal(err)
	}
	list, err := g.ListProfiles(t.Context(), nil)
	if err != nil || len(list.Profiles) != 2 || list.Profiles[0].Ranges != 1 {
		t.Errorf("recorded %v, %v", list, err)
	}
}

// A guest that waits hears at once that its container is ready, and who says so finds the
// profile made of its report.
func TestAwaitReady(t *testing.T) {
	g, v, s := profileRig(t)
	if _, err := v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.AwaitReady(t.Context(), &api.AwaitReadyRequest{ContainerId: "none"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("a container that there is not: %v", err)
	}
	box, err := g.find("one")
	if err != nil {
		t.Fatal(err)
	}
	c, _ := box.container("c1")
	told := make(chan error, 1)
	go func() {
		_, err := v.AwaitReady(t.Context(), &api.AwaitReadyRequest{ContainerId: "c1"})
		if err == nil {
			err = v.record(t, &api.RecordStartRequest{ContainerId: "c1", Ranges: []*api.Range{chunkRange(s, 0)}})
		}
		told <- err
	}()
	for awaited := false; !awaited; time.Sleep(time.Millisecond) {
		c.start.mu.Lock()
		awaited = c.start.awaited
		c.start.mu.Unlock()
	}
	if _, err := g.EndRecording(t.Context(), &api.EndRecordingRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	if err := <-told; err != nil {
		t.Error(err)
	}
	if list, err := g.ListProfiles(t.Context(), nil); err != nil || len(list.Profiles) != 2 {
		t.Errorf("after the report: %v, %v", list, err)
	}
	// Once more: it is ready.
	if _, err := v.AwaitReady(t.Context(), &api.AwaitReadyRequest{ContainerId: "c1"}); err != nil {
		t.Error(err)
	}
}

// A guest reports for its own containers only, and only so much.
func TestHostileReport(t *testing.T) {
	g, v, s := profileRig(t)
	g.attach(t, "two")
	if _, err := g.AddContainer(t.Context(), &api.AddContainerRequest{Sandbox: "two", ContainerId: "theirs", Reference: g.ref("app:v1")}); err != nil {
		t.Fatal(err)
	}
	many := make([]*api.Range, maxRecorded+1)
	for i := range many {
		many[i] = &api.Range{Offset: int64(i)}
	}
	for name, tc := range map[string]struct {
		req *api.RecordStartRequest
		is  func(error) bool
	}{
		"another sandbox's": {&api.RecordStartRequest{ContainerId: "theirs", Ranges: []*api.Range{chunkRange(s, 0)}}, errdefs.IsNotFound},
		"unknown":           {&api.RecordStartRequest{ContainerId: "../c1"}, errdefs.IsNotFound},
		"too many":          {&api.RecordStartRequest{ContainerId: "c1", Ranges: many}, errdefs.IsInvalidArgument},
		"times only":        {&api.RecordStartRequest{ContainerId: "c1", AfterMs: []uint32{1}}, errdefs.IsInvalidArgument},
	} {
		if err := v.record(t, tc.req); !tc.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := v.record(t, &api.RecordStartRequest{ContainerId: "c1", Ranges: []*api.Range{{Offset: -1, Length: -1}, nil, {Offset: 1 << 62, Length: 1 << 62}}}); err != nil {
		t.Errorf("nonsense: %v", err)
	}
	if list, err := g.ListProfiles(t.Context(), nil); err != nil || len(list.Profiles) > 0 {
		t.Errorf("profiles %v, %v", list, err)
	}
	g.cfg.Profile.Record = 0
	if err := v.record(t, &api.RecordStartRequest{ContainerId: "c1"}); !errdefs.IsNotImplemented(err) {
		t.Errorf("where nothing is recorded: %v", err)
	}
}

// The largest report that is taken fits into a request.
func TestLargestReport(t *testing.T) {
	_, v, _ := profileRig(t)
	req := &api.RecordStartRequest{ContainerId: "c1"}
	for range maxRecorded {
		req.Ranges = append(req.Ranges, &api.Range{Offset: 1<<41 - 1, Length: 1 << 20})
		req.AfterMs = append(req.AfterMs, 29_999)
	}
	if err := v.record(t, req); err != nil {
		t.Error(err)
	}
}

// Lists of paths come from people.
func TestImportProfile(t *testing.T) {
	g, v, _ := profileRig(t)
	for list, is := range map[string]func(error) bool{
		"../x\n": errdefs.IsInvalidArgument, "none\n": errdefs.IsInvalidArgument, "": errdefs.IsInvalidArgument,
	} {
		if _, err := g.ImportProfile(t.Context(), &api.ImportProfileRequest{Image: g.ref("app:v1"), Paths: []byte(list)}); !is(err) {
			t.Errorf("%q: %v", list, err)
		}
	}
	if _, err := g.ImportProfile(t.Context(), &api.ImportProfileRequest{Image: g.ref("none:v1"), Paths: []byte("a\n")}); !errdefs.IsNotFound(err) {
		t.Errorf("an image that there is not: %v", err)
	}
	got, err := g.ImportProfile(t.Context(), &api.ImportProfileRequest{Image: g.ref("app:v1"), Paths: []byte("# note\n/b\n/none\n")})
	if err != nil || got.Known != 1 || got.Unknown != 1 || got.Bytes < 100_000 || got.Bytes > 300_000 {
		t.Errorf("%v, %v", got, err)
	}
	d, err := v.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c1"})
	if err != nil || len(d.Profile) != 1 || d.Profile[0].Length < 100_000 {
		t.Errorf("told of %v, %v", d, err)
	}
}
