package progress

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// screen is a Display with a clock that the test moves.
type screen struct {
	*Display
	out bytes.Buffer
	at  time.Time
}

func newScreen(width func() int) *screen {
	s := &screen{at: time.Unix(1000, 0)}
	s.Display = newDisplay(&s.out, width, func() time.Time { return s.at })
	return s
}

// after lets d pass and returns what is written then.
func (s *screen) after(d time.Duration) string {
	s.out.Reset()
	s.at = s.at.Add(d)
	s.tick()
	return s.out.String()
}

func columns(n int) func() int { return func() int { return n } }

func TestTerminal(t *testing.T) {
	s := newScreen(columns(100))
	a := s.Start("layer a", 10_000_000)
	b := s.Start("layer b", -1)
	a.Add(2_500_000)
	b.Add(1000)
	want := "  layer a                    [#####---------------] 2.5 MB of 10.0 MB  2.5 MB/s  3s left\n" +
		"  layer b                    1.0 kB  1.0 kB/s\n"
	if got := s.after(time.Second); got != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	a.Add(1_000_000) // slower: the rate follows by and by
	want = "\r\x1b[2A\x1b[J" + "  layer a                    [#######-------------] 3.5 MB of 10.0 MB  2.0 MB/s  3s left\n" +
		"  layer b                    1.0 kB  700 B/s\n"
	if got := s.after(time.Second); got != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	s.out.Reset()
	a.Add(6_500_000)
	a.Done("")
	a.Done("twice")
	want = "\r\x1b[2A\x1b[Jlayer a                    10.0 MB in 2s\n  layer b                    1.0 kB  700 B/s\n"
	if got := s.out.String(); got != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	s.out.Reset()
	s.Close()
	if got := s.out.String(); got != "\r\x1b[1A\x1b[J" {
		t.Errorf("at the end %q", got)
	}
}

func TestPlain(t *testing.T) {
	s := newScreen(nil)
	j := s.Start("layer", 1_000_000_000)
	j.Add(50_000_000)
	if got := s.after(4 * time.Second); got != "" {
		t.Errorf("too early: %q", got)
	}
	if got, want := s.after(time.Second), "layer                      50.0 MB of 1.00 GB  10.0 MB/s  1m35s left\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	j.Add(-50_000_000) // it begins again
	if got, want := s.after(5*time.Second), "layer                      0 B of 1.00 GB\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	s.out.Reset()
	j.Done("is there already")
	s.Close()
	if got, want := s.out.String(), "layer                      is there already\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestLinesFit draws more jobs than there is room for, on a narrow terminal.
func TestLinesFit(t *testing.T) {
	s := newScreen(columns(40))
	for i := range 20 {
		s.Start(fmt.Sprintf("läyer %d %s", i, strings.Repeat("x", i)), 1e12).Add(5e12)
	}
	lines := strings.Split(strings.TrimSuffix(s.after(time.Hour), "\n"), "\n")
	if len(lines) != maxLines+1 || lines[maxLines] != "  and 8 more" {
		t.Errorf("%d lines, the last is %q", len(lines), lines[len(lines)-1])
	}
	for _, l := range lines {
		if n := len([]rune(l)); n > 39 {
			t.Errorf("%d characters: %q", n, l)
		}
	}
}

func TestDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 1499 * time.Millisecond: "1s", 59*time.Second + 600*time.Millisecond: "1m00s", 61 * time.Second: "1m01s", 90 * time.Minute: "1h30m", 100 * time.Hour: "100h00m",
	} {
		if got := duration(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

// TestNew is the real thing on a file that is no terminal.
func TestNew(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := New(f)
	d.Start("x", 1).Done("done")
	d.Close()
	got, err := os.ReadFile(f.Name())
	if err != nil || strings.TrimSpace(string(got)) != "x                          done" {
		t.Errorf("%q, %v", got, err)
	}
	j := None.Start("nothing", 1)
	j.Add(1)
	j.Done("")
}

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 315_169_762: "315.2 MB", 1_092_857_856: "1.09 GB"} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}
