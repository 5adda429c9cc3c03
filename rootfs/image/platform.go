package image

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// DefaultPlatform is what runs in a sandbox of this machine: Linux on this
// architecture, without a wish for more than its oldest variant.
func DefaultPlatform() ocispec.Platform {
	return ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
}

// ParsePlatform parses "os/architecture" or "os/architecture/variant", as in
// linux/arm64; "" is DefaultPlatform.
func ParsePlatform(s string) (ocispec.Platform, error) {
	if s == "" {
		return DefaultPlatform(), nil
	}
	part := strings.Split(s, "/")
	if len(part) < 2 || len(part) > 3 || slices.Contains(part, "") {
		return ocispec.Platform{}, fmt.Errorf("platform %q: give os/architecture or os/architecture/variant, as in linux/arm64: %w", s, errdefs.ErrInvalidArgument)
	}
	p := ocispec.Platform{OS: part[0], Architecture: part[1]}
	if len(part) == 3 {
		p.Variant = part[2]
	}
	return p, nil
}

// normalize fills in what a platform leaves out and undoes other spellings.
func normalize(p ocispec.Platform) ocispec.Platform {
	p.OS = strings.ToLower(p.OS)
	p.Architecture = strings.ToLower(p.Architecture)
	p.Variant = strings.ToLower(p.Variant)
	if p.OS == "" {
		p.OS = "linux"
	}
	switch p.Architecture {
	case "x86_64", "x86-64":
		p.Architecture = "amd64"
	case "aarch64":
		p.Architecture = "arm64"
	}
	if p.Variant == "" {
		// What a missing variant stands for: image-spec, "Platform Variants",
		// and the oldest x86-64 level.
		p.Variant = map[string]string{"amd64": "v1", "arm": "v7", "arm64": "v8"}[p.Architecture]
	}
	return p
}

// rank says how well an image for have runs on want: 0 not at all, more is
// better. A machine runs the variants up to its own; the nearest is the best.
func rank(have, want ocispec.Platform) int {
	have, want = normalize(have), normalize(want)
	if have.OS != want.OS || have.Architecture != want.Architecture {
		return 0
	}
	if have.Variant == want.Variant {
		return 1000
	}
	h, okHave := level(have.Variant)
	w, okWant := level(want.Variant)
	if !okHave || !okWant || h > w {
		return 0
	}
	return 1000 - (w - h)
}

// level orders variants: "v8" is 80, "v8.1" is 81.
func level(variant string) (int, bool) {
	var major, minor int
	if n, err := fmt.Sscanf(variant, "v%d.%d", &major, &minor); n < 1 && err != nil {
		return 0, false
	}
	if major < 0 || major > 9 || minor < 0 || minor > 9 {
		return 0, false
	}
	return major*10 + minor, true
}

// choose returns the manifest of an index that fits best; of equals the first,
// as the image-spec asks. One without a platform fits when nothing else does:
// its config tells later.
func choose(list []ocispec.Descriptor, want ocispec.Platform) (ocispec.Descriptor, error) {
	best, bestRank := ocispec.Descriptor{}, 0
	for _, d := range list {
		r := 0
		if d.Platform == nil || d.Platform.Architecture == "" {
			r = 1
		} else {
			r = rank(*d.Platform, want)
		}
		if r > bestRank {
			best, bestRank = d, r
		}
	}
	if bestRank == 0 {
		return best, fmt.Errorf("no image for platform %s; available: %s: %w", format(want), available(list), errdefs.ErrNotFound)
	}
	return best, nil
}

// available lists platforms for an error, a bounded number of them.
func available(list []ocispec.Descriptor) string {
	var names []string
	for _, d := range list {
		if d.Platform == nil || d.Platform.OS == "unknown" {
			continue // attestations of BuildKit say "unknown/unknown"
		}
		if len(names) == 32 {
			names = append(names, "…")
			break
		}
		names = append(names, format(*d.Platform))
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// FormatPlatform is "os/architecture[/variant]".
func FormatPlatform(p ocispec.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// format is a platform for an error; it may come from anywhere.
func format(p ocispec.Platform) string {
	s := FormatPlatform(p)
	return fmt.Sprintf("%q", s[:min(len(s), 64)])
}
