package vmtest_test

import (
	"strings"
	"testing"

	imageservice "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/vmtest"
)

func TestBoot(t *testing.T) {
	g := vmtest.Boot(t, vmtest.Options{})
	h, err := g.Guest.Health(t.Context(), &imageservice.HealthRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if h.Kernel == "" || !strings.Contains(strings.Join(h.Paths, " "), "loop") {
		t.Errorf("health: %v", h)
	}
	if _, err := g.Runner.PowerOff(t.Context(), &imageservice.PowerOffRequest{}); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	if err := g.Err(); err != nil {
		t.Errorf("after the power off: %v", err)
	}
}
