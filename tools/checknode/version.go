package checknode

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// version is a program's.
type version struct {
	text         string
	major, minor int
}

func (v version) String() string { return v.text }

func (v version) zero() bool { return v.text == "" }

func (v version) atLeast(major, minor int) bool {
	return v.major > major || v.major == major && v.minor >= minor
}

// parseVersion reads "1.6.20~ds1", "v2.4.0-beta.0", "2.2.2-k3s1".
func parseVersion(s string) (version, error) {
	text := strings.TrimPrefix(s, "v")
	major, rest, ok := strings.Cut(text, ".")
	minor := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
	a, err1 := strconv.Atoi(major)
	b, err2 := strconv.Atoi(minor)
	if !ok || err1 != nil || err2 != nil || a < 0 {
		return version{}, fmt.Errorf("version %.40q of containerd is not understood: want MAJOR.MINOR: %w", s, errdefs.ErrInvalidArgument)
	}
	return version{text, a, b}, nil
}

// versionLine reads what `containerd --version` prints: its import path, its
// version, its commit (cmd/containerd/command/main.go).
func versionLine(line string) (version, error) {
	fields := strings.Fields(line)
	if len(fields) < 3 || fields[0] != "containerd" {
		return version{}, fmt.Errorf("answer of `containerd --version` is not understood: %.80q: %w", line, errdefs.ErrInvalidArgument)
	}
	return parseVersion(fields[2])
}

// assume is the oldest containerd that a schema is for.
func assume(schema int) version {
	switch {
	case schema >= 4:
		return version{"2.3", 2, 3}
	case schema == 3:
		return version{"2.0", 2, 0}
	}
	return version{"1.7", 1, 7}
}

// version is what the options say, else what the program does; zero where
// nobody can be asked.
func (n *node) version(ctx context.Context) (version, []Finding) {
	if n.opts.Version == "" && n.system == nil {
		return version{}, nil
	}
	v, err := parseVersion(n.opts.Version)
	if n.opts.Version == "" {
		v, err = n.ask(ctx)
	}
	if err != nil {
		return version{}, []Finding{{Severity: Warning, What: "the version of containerd is not known, and an old one is assumed: " + err.Error(),
			Add: []string{"tatami check node --containerd-version VERSION"}}}
	}
	return v, nil
}

// ask asks the program itself.
func (n *node) ask(ctx context.Context) (version, error) {
	line, err := n.system.containerdVersion(ctx)
	if err != nil {
		return version{}, err
	}
	return versionLine(line)
}
