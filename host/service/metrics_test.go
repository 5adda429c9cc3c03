package service

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// The counters of a node that works are there to be scraped, until it ends.
func TestMetricsServed(t *testing.T) {
	g := newRig(t)
	g.push("app:v1", map[string]string{"a": "x"})
	g.attach(t, "one")
	g.add(t, &vm{id: "one"}, "c1", "app:v1")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	g.startMetrics(t.Context(), address)() // in use: nothing fails
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	stop := g.startMetrics(t.Context(), address)
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + address + path)
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
	if code, _ := get("/healthz"); code != http.StatusServiceUnavailable {
		t.Errorf("before the control socket is served: %d", code)
	}
	g.running.Store(true)
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("while it is served: %d", code)
	}
	code, text := get("/metrics")
	for _, want := range []string{"\ntatami_images 1\n", "\ntatami_sandboxes 1\n", "\ntatami_registry_manifest_requests_total{host=\"" + g.reg.Host() + "\"} 1\n"} {
		if code != http.StatusOK || !strings.Contains(text, want) {
			t.Errorf("status %d, no %q", code, want)
		}
	}
	stop()
	if _, err := net.Dial("tcp", address); err == nil {
		t.Error("it is served after its end")
	}
}
