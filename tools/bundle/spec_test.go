package bundle

import (
	"errors"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

func TestSpecCommand(t *testing.T) {
	for _, c := range []struct {
		name            string
		entrypoint, cmd []string
		args, want      []string
		missing         bool
	}{
		{name: "image's own", entrypoint: []string{"python3"}, cmd: []string{"-V"}, want: []string{"python3", "-V"}},
		{name: "arguments replace cmd", entrypoint: []string{"python3"}, cmd: []string{"-V"}, args: []string{"-c", "1"}, want: []string{"python3", "-c", "1"}},
		{name: "no entrypoint", cmd: []string{"sh"}, args: []string{"true"}, want: []string{"true"}},
		{name: "nothing", missing: true},
	} {
		s, err := Spec(ocispec.ImageConfig{Entrypoint: c.entrypoint, Cmd: c.cmd}, c.args, "box")
		if c.missing {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("%s: error %v", c.name, err)
			}
			continue
		}
		if err != nil || !slices.Equal(s.Process.Args, c.want) {
			t.Errorf("%s: %v, %v; want %v", c.name, s, err, c.want)
		}
	}
}

func TestSpecUserEnvAndDir(t *testing.T) {
	for _, c := range []struct {
		user      string
		uid, gid  uint32
		annotated string
	}{
		{user: ""},
		{user: "1000:100", uid: 1000, gid: 100},
		{user: "www-data", annotated: "www-data"},
		{user: "1000", annotated: "1000"}, // its group is in /etc/passwd
		{user: "1000:audio", annotated: "1000:audio"},
		{user: "4294967296:1", annotated: "4294967296:1"},
	} {
		s, err := Spec(ocispec.ImageConfig{Cmd: []string{"x"}, User: c.user, WorkingDir: "srv", Env: []string{"A=b"}}, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		u := s.Process.User
		if u.UID != c.uid || u.GID != c.gid || s.Annotations[api.UserAnnotation] != c.annotated {
			t.Errorf("user %q: %d:%d, annotation %q", c.user, u.UID, u.GID, s.Annotations[api.UserAnnotation])
		}
		if s.Process.Cwd != "/srv" || !slices.Equal(s.Process.Env, []string{defaultPath, "A=b"}) {
			t.Errorf("cwd %q, env %q", s.Process.Cwd, s.Process.Env)
		}
	}
	s, err := Spec(ocispec.ImageConfig{Cmd: []string{"x"}, Env: []string{"PATH=/x"}}, nil, "")
	if err != nil || !slices.Equal(s.Process.Env, []string{"PATH=/x"}) {
		t.Errorf("env %q, %v", s.Process.Env, err)
	}
}
