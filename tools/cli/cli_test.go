package cli

import (
	"bytes"
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		out  string // in standard output
		err  string // in standard error
	}{
		{nil, 0, "tatami run", ""},
		{[]string{"help"}, 0, "tatami mount", ""},
		{[]string{"version"}, 0, "tatami ", ""},
		{[]string{"fly"}, exitFailed, "", `unknown command "fly"`},
		{[]string{"run"}, exitFailed, "", "no image named"},
		{[]string{"run", "-h"}, 0, "", "-mount-path"},
		{[]string{"run", "--nonsense"}, exitFailed, "", "nonsense"},
		{[]string{"run", "--format", "xml", "x"}, exitFailed, "", `"xml"`},
		{[]string{"run", "--vm", "moon", "x"}, exitFailed, "", "moon"},
		{[]string{"run", "--mode", "full", "debian"}, exitFailed, "", "HOST:PORT"},
		{[]string{"mount", "x"}, exitFailed, "", "IMAGE DIR"},
		{[]string{"bench"}, exitFailed, "", "bench start"},
		{[]string{"bench", "start", "--link", "fast", "x"}, exitFailed, "", "fast"},
		{[]string{"bench", "start", "debian"}, exitFailed, "", "HOST:PORT"},
	} {
		var out, errs bytes.Buffer
		code := Main(t.Context(), c.args, Streams{In: strings.NewReader(""), Out: &out, Err: &errs})
		if code != c.code || !strings.Contains(out.String(), c.out) || !strings.Contains(errs.String(), c.err) {
			t.Errorf("%q: exit code %d\n%s%s", c.args, code, out.String(), errs.String())
		}
	}
}
