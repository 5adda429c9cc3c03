package scale

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/link"
	"github.com/tatami-containers/tatami/tools/run"
)

// storm is a number of sandboxes that start at the same time, once on a node that has
// nothing, and again when it has the image.
type storm struct {
	name  string
	count int
	pack  func([]byte) (registrytest.Layer, error)
	full  bool // a pull in each guest, past the node
}

// figures of a storm; times in seconds, sizes in bytes.
type figures struct {
	name     string
	execs    []float64 // to the container's process, of every sandbox
	dones    []float64 // to its end
	bytes    float64   // from the registry, times the image
	requests int       // at the registry
	cpu      float64   // of tatami-host
	resident int64     // of tatami-host, at most
	guest    int64     // of the largest tatami-guest, at the end of its container
}

// BenchmarkSandboxes measures TATAMI_SCALE_SANDBOXES (50) at a time against one, and
// against as many full pulls, over TATAMI_SCALE_LINK (1gbit,5ms).
func BenchmarkSandboxes(b *testing.B) {
	if why := missing(); why != "" {
		b.Skip(why)
	}
	count, err := strconv.Atoi(cmp.Or(os.Getenv("TATAMI_SCALE_SANDBOXES"), "50"))
	if err != nil || count < 2 {
		b.Fatalf("TATAMI_SCALE_SANDBOXES: want a number of 2 or more (%v)", err)
	}
	shape, err := link.ParseShape(cmp.Or(os.Getenv("TATAMI_SCALE_LINK"), "1gbit,5ms"))
	if err != nil {
		b.Fatal(err)
	}
	b.Setenv("TMPDIR", b.TempDir())
	for b.Loop() {
		var all []figures
		for _, f := range formats {
			for _, n := range []int{1, count} {
				all = append(all, measureStorm(b, storm{name: f.name, count: n, pack: f.make}, shape)...)
			}
		}
		all = append(all, measureStorm(b, storm{name: "full pull in each", count: count, pack: formats[0].make, full: true}, shape)...)
		fmt.Print(table(all))
	}
}

// What the container reads, a third of the image: files of 1 MiB.
const benchFiles, benchSize = 24, 1 << 20

// site is a registry with the image, behind a link.
type site struct {
	*registrytest.Server
	link *link.Link
	tcp  string // the link's address
	stop func() error
}

func openSite(ctx context.Context, a *application, shape link.Shape) (*site, error) {
	near, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &site{Server: registrytest.New(registrytest.Options{}), tcp: near.Addr().String()}
	s.PushImage("app", "v1", a.image)
	s.link = link.New(s.Host(), shape)
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- s.link.Serve(ctx, near) }()
	s.stop = func() error { cancel(); s.Close(); return <-served }
	return s, nil
}

func measureStorm(b *testing.B, s storm, shape link.Shape) (out []figures) {
	b.Helper()
	a, err := newApplication(s.pack, benchFiles, benchSize)
	if err != nil {
		b.Fatal(err)
	}
	where, err := openSite(b.Context(), a, shape)
	if err != nil {
		b.Fatal(err)
	}
	n, err := startNode(b.Context(), where.tcp)
	if err != nil {
		b.Fatal(errors.Join(err, where.stop()))
	}
	for _, state := range s.states() {
		f, err := n.measure(b.Context(), s, where, a)
		if err != nil {
			b.Error(err)
			break
		}
		f.name = fmt.Sprintf("%s%s, %d", s.name, state, s.count)
		out = append(out, f)
	}
	if err := errors.Join(n.close(), where.stop()); err != nil {
		b.Error(err)
	}
	return out
}

// states of the node that make a difference: a full pull keeps nothing there.
func (s storm) states() []string {
	if s.full {
		return []string{""}
	}
	return []string{", cold node", ", warm node"}
}

func (n *node) measure(ctx context.Context, s storm, where *site, a *application) (figures, error) {
	where.Reset()
	before, err := n.usage()
	if err != nil {
		return figures{}, err
	}
	reports, err := n.sandboxes(ctx, s.count, where.tcp+"/app:v1", a, func(o *run.Options) {
		if s.full {
			o.Mode, o.Source, o.Registry = run.Full, run.SourceRegistry, where.link.Serve
		}
	})
	if err != nil {
		return figures{}, err
	}
	after, err := n.usage()
	f := figures{bytes: float64(where.Total().Bytes) / float64(a.size), requests: where.Total().Requests,
		cpu: (after.cpu - before.cpu).Seconds(), resident: after.resident}
	for _, r := range reports {
		f.execs = append(f.execs, r.FirstExec)
		f.dones = append(f.dones, r.Done)
		if r.Guest != nil {
			f.guest = max(f.guest, r.Guest.Resident)
		}
	}
	return f, err
}

// table prints Markdown: seconds, MiB, and what is for each sandbox.
func table(all []figures) string {
	var b strings.Builder
	b.WriteString("| | first exec, median | p99 | done, p99 | registry bytes | requests | host CPU | host memory | largest guest |\n|---|---|---|---|---|---|---|---|---|\n")
	for _, f := range all {
		fmt.Fprintf(&b, "| %s | %.2f s | %.2f s | %.2f s | %.2f× | %d | %.2f s | %d MiB | %d MiB |\n", f.name,
			quantile(f.execs, 0.5), quantile(f.execs, 0.99), quantile(f.dones, 0.99),
			f.bytes, f.requests, f.cpu, f.resident>>20, f.guest>>20)
	}
	return b.String()
}

// quantile is the smallest value that a share q of the values does not exceed (nearest
// rank); with less than a hundred values 0.99 is the largest.
func quantile(values []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(values))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}
