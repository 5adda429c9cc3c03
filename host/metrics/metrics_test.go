package metrics

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/host/blobs"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// counted is a node of which everything is counted.
func counted() Values {
	queue := func(name string, turns bool) sched.QueueStatus {
		return sched.QueueStatus{Name: name, Turns: turns, Limit: 8, Classes: []sched.ClassStatus{
			{Class: "online", Total: 3_000_000, Waiting: [3]int{1, 2, 3}, Waits: 4, Waited: 5 * time.Second, Promoted: 6, Oldest: time.Millisecond}, {Class: "batch"},
		}}
	}
	return Values{
		Node: node.Stats{
			Store: store.Stats{
				Classes: []store.ClassStats{{Hits: 1}, {Class: "batch", Ranks: [3]store.RankStats{{Misses: 2, Wait: 3 * time.Second, Promoted: 4}}}},
				Sources: []store.SourceStats{{Name: "registry", Requests: 7}},
			},
			Registry: registry.Stats{Hosts: []registry.HostStats{{Host: "r.example", Requests: 5, Refused: 1}, {Host: "bad\xffname"}}},
		},
		Space: store.Space{Used: 9, Evicted: 10}, Blobs: blobs.Stats{Used: 11},
		Classes:    []sched.Class{{Name: "online", Share: 95}, {Name: "batch", Share: 5}},
		Queues:     []sched.QueueStatus{queue("link", false), queue("cpu", true)},
		Containers: map[string]int64{"batch": 12}, Sandboxes: 13, RelayBytes: 14,
	}
}

// serve starts a server and returns how to ask it.
func serve(t *testing.T, read func() Values, healthy func() error) (get func(path string) (int, string)) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, ended := New(read, healthy, slog.New(slog.DiscardHandler)), make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), <-ended); err != nil {
			t.Error(err)
		}
	})
	return func(path string) (int, string) {
		resp, err := http.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
}

func TestMetrics(t *testing.T) {
	get := serve(t, counted, func() error { return nil })
	code, text := get("/metrics")
	if code != http.StatusOK {
		t.Fatalf("status %d: %s", code, text)
	}
	for _, line := range []string{
		`tatami_store_hits_total{class="none"} 1`, `tatami_store_misses_total{class="batch",rank="demand"} 2`, `tatami_store_promotions_total{class="batch",rank="demand"} 4`,
		`tatami_store_miss_wait_seconds_total{class="batch",rank="demand"} 3`, `tatami_store_source_requests_total{source="registry"} 7`,
		"tatami_store_evicted_bytes_total 10", "tatami_blobs_used_bytes 11", `tatami_registry_refused_total{host="r.example"} 1`,
		`tatami_registry_requests_total{host="bad?name"} 0`,
		`tatami_queue_bytes_total{class="online",queue="link"} 3e+06`, `tatami_queue_turn_seconds_total{class="online",queue="cpu"} 3`,
		`tatami_queue_waiting{class="online",queue="link",rank="background"} 3`, `tatami_queue_wait_seconds_total{class="online",queue="cpu"} 5`,
		`tatami_queue_promotions_total{class="online",queue="link"} 6`, `tatami_queue_limit_bytes_per_second{queue="link"} 8`, `tatami_queue_turns{queue="cpu"} 8`,
		`tatami_class_share{class="batch"} 5`, `tatami_containers{class="batch"} 12`, `tatami_containers{class="online"} 0`,
		"tatami_sandboxes 13", "tatami_relay_sent_bytes_total 14",
	} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("there is no %q", line)
		}
	}
	for _, none := range []string{`tatami_queue_bytes_total{class="online",queue="cpu"}`, `tatami_queue_turns{queue="link"}`} {
		if strings.Contains(text, none) {
			t.Errorf("there is %q", none)
		}
	}
	if !strings.Contains(text, "\nprocess_resident_memory_bytes ") || !strings.Contains(text, "\ngo_goroutines ") {
		t.Error("there is nothing of the process")
	}
	for path, want := range map[string]int{"/": http.StatusNotFound, "/debug/pprof/": http.StatusNotFound} {
		if code, _ := get(path); code != want {
			t.Errorf("%s: %d, want %d", path, code, want)
		}
	}
}

// A registry may redirect to hosts whose names are those of others, or of queues.
func TestEqualNames(t *testing.T) {
	get := serve(t, func() Values {
		v := counted()
		v.Node.Registry.Hosts = append(v.Node.Registry.Hosts, registry.HostStats{Host: "bad\xfename", Requests: 8})
		v.Queues = append(v.Queues, sched.QueueStatus{Name: "link", Classes: []sched.ClassStatus{{Class: "online", Total: 9}}})
		return v
	}, func() error { return nil })
	code, text := get("/metrics")
	if code != http.StatusOK || !strings.Contains(text, "\n"+`tatami_queue_bytes_total{class="online",queue="link"} 3e+06`+"\n") {
		t.Errorf("%d %.200s", code, text)
	}
}

// Prometheus' own checker finds nothing to say about names, units and the text.
func TestPromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("needs promtool of Debian's package prometheus: `make setup` installs it")
	}
	_, text := serve(t, counted, func() error { return nil })("/metrics")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	check := func(text string) (string, error) {
		cmd := exec.CommandContext(ctx, promtool, "check", "metrics")
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.CombinedOutput()
		return string(bytes.TrimSpace(out)), err
	}
	var ours strings.Builder // what the collectors of the process are called is not ours
	for line := range strings.Lines(text) {
		if strings.Contains(line, "tatami_") {
			ours.WriteString(line)
		}
	}
	if out, err := check(ours.String()); err != nil || out != "" {
		t.Errorf("promtool says: %s (%v)", out, err)
	}
	if _, err := check("# TYPE tatami_x_milliseconds counter\ntatami_x_milliseconds 1\n"); err == nil {
		t.Error("promtool finds nothing where there is something")
	}
}

func TestHealth(t *testing.T) {
	get := serve(t, counted, func() error { return errors.New("it starts") })
	if code, text := get("/healthz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "it starts") {
		t.Errorf("%d %s", code, text)
	}
	get = serve(t, counted, func() error { return nil })
	if code, text := get("/healthz"); code != http.StatusOK || text != "ok\n" {
		t.Errorf("%d %s", code, text)
	}
}
