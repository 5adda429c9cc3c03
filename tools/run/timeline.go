package run

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tools/progress"
)

// Phase is a step of a start.
type Phase struct {
	Name string `json:"name"`
	// Start is counted from the moment of the command, Took is the step's
	// length; both in seconds. Steps overlap.
	Start float64 `json:"start_s"`
	Took  float64 `json:"took_s"`
}

// Report is what one run says of itself.
type Report struct {
	Image     string `json:"image"`
	Digest    string `json:"manifest_digest"`
	Mode      string `json:"mode"`
	VM        string `json:"vm"`
	Accel     string `json:"accel,omitempty"`
	MountPath string `json:"mount_path"`
	// Source is where the guest takes the image from: "virtio-fs", "relay" or
	// "registry".
	Source string  `json:"source"`
	Index  string  `json:"index,omitempty"`
	Phases []Phase `json:"phases"`
	// Mounted, FirstExec and Done are seconds from the command to the image
	// mounted and the container's process running and ended.
	Mounted   float64 `json:"mounted_s"`
	FirstExec float64 `json:"first_exec_s"`
	Done      float64 `json:"done_s"`
	ExitCode  int     `json:"exit_code"`

	CompressedSize int64 `json:"compressed_size"` // bytes of the layers
	ImageSize      int64 `json:"image_size"`      // bytes of the one-file image
	// FetchedAtMount, FetchedAtExec and Fetched are bytes that came from the
	// registry until the mount, the first exec and the end.
	FetchedAtMount int64        `json:"fetched_at_mount"`
	FetchedAtExec  int64        `json:"fetched_at_exec"`
	Fetched        int64        `json:"fetched"`
	Guest          *GuestReport `json:"guest,omitempty"`
}

// GuestReport is what the guest's store counted.
type GuestReport struct {
	Hits           int64            `json:"hits"`
	Misses         int64            `json:"misses"`
	WaitSeconds    float64          `json:"wait_s"`
	Sources        map[string]int64 `json:"source_bytes"`
	Requests       map[string]int64 `json:"source_requests"`
	VerifyFailures int64            `json:"verify_failures"`
	Resident       int64            `json:"resident_bytes"`
	Restarts       int64            `json:"restarts"`
	Replayed       int64            `json:"replayed_bytes"`
}

func guestReport(s *api.StatsResponse) *GuestReport {
	g := &GuestReport{Hits: s.Hits, Misses: s.Misses, WaitSeconds: float64(s.WaitUs) / 1e6,
		VerifyFailures: s.VerifyFailures, Resident: s.ResidentBytes, Restarts: s.Restarts, Replayed: s.ReplayedBytes,
		Sources: map[string]int64{}, Requests: map[string]int64{}}
	for _, src := range s.Sources {
		g.Sources[src.Name], g.Requests[src.Name] = src.Bytes, src.Requests
	}
	return g
}

// timeline collects phases from several goroutines.
type timeline struct {
	start time.Time

	mu     sync.Mutex
	phases []Phase
}

func newTimeline() *timeline { return &timeline{start: time.Now()} }

// since is the time from the start of the run in seconds.
func (t *timeline) since() float64 { return time.Since(t.start).Seconds() }

// step begins a phase; calling the result ends it.
func (t *timeline) step(name string) (end func()) {
	from := t.since()
	return func() { t.add(Phase{name, from, t.since() - from}) }
}

// remote adds the phases that a daemon told of, its call having begun at from.
func (t *timeline) remote(from float64, phases []*api.Phase) {
	for _, p := range phases {
		t.add(Phase{p.Name, from + float64(p.StartUs)/1e6, float64(p.DurationUs) / 1e6})
	}
}

func (t *timeline) add(p Phase) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.phases = append(t.phases, p)
}

func (t *timeline) list() []Phase {
	t.mu.Lock()
	defer t.mu.Unlock()
	slices.SortStableFunc(t.phases, func(a, b Phase) int { return cmp.Compare(a.Start, b.Start) })
	return slices.Clone(t.phases)
}

// WriteJSON writes the report as one JSON object.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "phase\tfrom\ttook\t\n")
	for _, p := range r.Phases {
		fmt.Fprintf(tw, "%s\t%.2f s\t%.2f s\t%s\n", p.Name, p.Start, p.Took, bar(p, r.Done))
	}
	fmt.Fprintf(tw, "first exec\t%.2f s\t\t\ndone\t%.2f s\t\t\n", r.FirstExec, r.Done)
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprint(w, r.bytesLine(), r.guestLine())
	return err
}

const barWidth = 40

// bar draws a phase on a scale from 0 to total seconds.
func bar(p Phase, total float64) string {
	if total <= 0 {
		return ""
	}
	at := func(s float64) int { return min(barWidth-1, int(s/total*barWidth)) }
	from, to := at(p.Start), at(p.Start+p.Took)
	return strings.Repeat(" ", from) + strings.Repeat("#", to-from+1)
}

func (r *Report) bytesLine() string {
	line := fmt.Sprintf("fetched from the registry: %s until the first exec, %s in all, of %s", progress.Bytes(r.FetchedAtExec), progress.Bytes(r.Fetched), progress.Bytes(r.CompressedSize))
	if r.CompressedSize > 0 {
		line += fmt.Sprintf(" (%.1f %%)", 100*float64(r.Fetched)/float64(r.CompressedSize))
	}
	return line + fmt.Sprintf("; unpacked the image has %s\n", progress.Bytes(r.ImageSize))
}

// direct says whether the kernel in the guest reads the image by itself: the
// guest's daemon counts the mount and no bytes.
func (r *Report) direct() bool {
	return r.Source == "virtio-fs" && r.Guest.Sources[r.Source] == 0
}

func (r *Report) guestLine() string {
	g := r.Guest
	if g == nil {
		return ""
	}
	if r.direct() {
		return fmt.Sprintf("guest: its kernel reads the node's image file over virtio-fs, which nobody counts; daemon %s resident\n", progress.Bytes(g.Resident))
	}
	line := fmt.Sprintf("guest: image from %s; %d reads answered at once, %d waited (%.2f s together)", r.Source, g.Hits, g.Misses, g.WaitSeconds)
	for name, n := range g.Sources {
		line += fmt.Sprintf("; %s %s in %d requests", name, progress.Bytes(n), g.Requests[name])
	}
	if g.VerifyFailures > 0 {
		line += fmt.Sprintf("; %d chunks came wrong and were fetched again", g.VerifyFailures)
	}
	return line + fmt.Sprintf("; daemon %s resident\n", progress.Bytes(g.Resident))
}
