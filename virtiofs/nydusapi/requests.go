package nydusapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Kind says what is mounted: the "fs_type" of a request.
type Kind string

// The kinds that Kata's runtimes ask for (nydus_daemon.rs; nydusd.go).
const (
	Passthrough Kind = "passthrough_fs" // a directory with what comes to lie in it
	RAFS        Kind = "rafs"           // the image of a container
)

// Containers is where a Passthrough is mounted (SHARED_PATH_IN_GUEST in
// nydus_daemon.rs, sharedPathInGuest in nydusd.go).
const Containers = "/containers"

// imagePath is where a RAFS is mounted: mount_rafs in share_virtio_fs_nydus.rs,
// rafsMountPath in kata_agent.go. The word is the ID of a container as Kata
// accepts it (verify_id in its kata-sys-util/src/validate.rs).
var imagePath = regexp.MustCompile(`^/rafs/[A-Za-z0-9][A-Za-z0-9_.-]{0,254}/lowerdir$`)

// allowed says whether a kind may be mounted at a path.
func (k Kind) allowed(at string) bool {
	switch k {
	case Passthrough:
		return at == Containers
	case RAFS:
		return imagePath.MatchString(at)
	}
	return false
}

const maxPath = 4096 // bytes, PATH_MAX

// mountRequest is the body of a POST: MountRequest of both clients. nydusd's has more
// fields, which mean nothing here.
type mountRequest struct {
	Kind   Kind   `json:"fs_type"`
	Source string `json:"source"`
	Config string `json:"config"`
}

func (s *Server) mount(r *http.Request) (any, error) {
	at, err := mountpoint(r.URL)
	if err != nil {
		return nil, err
	}
	m, err := readMount(r.Body)
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", at, err)
	}
	if !m.Kind.allowed(at) {
		return nil, fmt.Errorf("mount at %s: %w: fs_type %.64q is not mounted there: %s is at %s, %s at /rafs/<container>/lowerdir",
			at, errdefs.ErrInvalidArgument, m.Kind, Passthrough, Containers, RAFS)
	}
	if err := s.cfg.Mounts.Mount(at, m.Kind, m.Source, m.Config); err != nil {
		return nil, fmt.Errorf("mount %s at %s: %w", m.Source, at, err)
	}
	s.cfg.Log.Info("mounted", "at", at, "type", m.Kind, "source", m.Source)
	return nil, nil
}

func (s *Server) unmount(r *http.Request) (any, error) {
	at, err := mountpoint(r.URL)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Mounts.Unmount(at); err != nil {
		return nil, fmt.Errorf("unmount %s: %w", at, err)
	}
	s.cfg.Log.Info("unmounted", "at", at)
	return nil, nil
}

// mountpoint is the only parameter of a request. runtime-rs encodes it, the Go
// runtime does not.
func mountpoint(u *url.URL) (string, error) {
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "", fmt.Errorf("parameters: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	at := q["mountpoint"]
	if len(q) != 1 || len(at) != 1 {
		return "", fmt.Errorf("parameters: %w: give one mountpoint", errdefs.ErrInvalidArgument)
	}
	if !Passthrough.allowed(at[0]) && !RAFS.allowed(at[0]) {
		return "", fmt.Errorf("mountpoint %.300q: %w: it is %s or /rafs/<container>/lowerdir", at[0], errdefs.ErrInvalidArgument, Containers)
	}
	return at[0], nil
}

// readMount reads a body, which is one record.
func readMount(r io.Reader) (m mountRequest, err error) {
	d := json.NewDecoder(r)
	if err := d.Decode(&m); err != nil {
		return m, fmt.Errorf("body: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return m, fmt.Errorf("body: %w: more follows the record", errors.Join(errdefs.ErrInvalidArgument, err))
	}
	if !path.IsAbs(m.Source) || len(m.Source) >= maxPath || strings.ContainsRune(m.Source, 0) {
		return m, fmt.Errorf("source %.64q: %w: not an absolute path", m.Source, errdefs.ErrInvalidArgument)
	}
	return m, nil
}

// daemonInfo is DaemonInfo of both clients: runtime-rs wants state, version and all
// that is in it.
type daemonInfo struct {
	ID      string  `json:"id"`
	Version version `json:"version"`
	State   string  `json:"state"`
}

type version struct {
	PackageVer string `json:"package_ver"`
	GitCommit  string `json:"git_commit"`
	BuildTime  string `json:"build_time"`
	Profile    string `json:"profile"`
	Rustc      string `json:"rustc"`
}

// running is the state that both clients wait for, before they start the machine: so
// it says nothing of a VMM.
const running = "RUNNING"

func (s *Server) daemon(*http.Request) (any, error) {
	return daemonInfo{ID: s.cfg.ID, Version: built(), State: running}, nil
}

// built tells of this program. It was made by Go, whatever the field is called.
var built = sync.OnceValue(func() version {
	v := version{Profile: "release", Rustc: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	v.PackageVer = info.Main.Version
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.GitCommit = s.Value
		case "vcs.time":
			v.BuildTime = s.Value
		}
	}
	return v
})
