package bench

import (
	"bytes"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tools/run"
)

func TestRegistryOf(t *testing.T) {
	for _, c := range []struct{ image, host, rest string }{
		{"127.0.0.1:5000/a/b:v1", "127.0.0.1:5000", "a/b:v1"},
		{"registry.local:80/x@sha256:0", "registry.local:80", "x@sha256:0"},
		{"debian", "", ""},
		{"docker.io/library/debian", "", ""},
		{"name:tag", "", ""},
	} {
		host, rest, err := RegistryOf(c.image)
		if host != c.host || rest != c.rest || (err == nil) != (c.host != "") {
			t.Errorf("%s: %q, %q, %v", c.image, host, rest, err)
		}
	}
}

func TestTableComparesMedians(t *testing.T) {
	c := &Comparison{Reports: map[string][]*run.Report{
		FullPull: {{FirstExec: 50, Done: 60}, {FirstExec: 10, Done: 12}, {FirstExec: 20, Done: 24}},
		Cold:     {{FirstExec: 5, Done: 8, Phases: []run.Phase{{Name: "layers", Start: 1, Took: 2}}}},
		Warm:     {{FirstExec: 2, Done: 4}},
	}}
	var out bytes.Buffer
	if err := c.WriteText(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{
		{"layers", "-", "2.00 s at   1.00 s", "-"},
		{"first exec at", "20.00 s", "5.00 s", "2.00 s"},
		{"first exec, faster", "1.0×", "4.0×", "10.0×"},
		{"done, faster", "1.0×", "3.0×", "6.0×"},
	} {
		if !hasRow(out.String(), want) {
			t.Errorf("no row %q in\n%s", want, out.String())
		}
	}
}

func hasRow(table string, cells []string) bool {
	for line := range strings.Lines(table) {
		rest, ok := line, true
		for _, c := range cells {
			if _, rest, ok = strings.Cut(rest, c); !ok {
				break
			}
		}
		if ok {
			return true
		}
	}
	return false
}
