package mount

import (
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	for _, c := range []struct{ took, want time.Duration }{
		{0, settle},
		{time.Millisecond, settle},
		{10 * time.Millisecond, 200 * time.Millisecond},
		{time.Minute, settleMax},
	} {
		if got := (&Pace{took: c.took}).Wait(); got != c.want {
			t.Errorf("after a look of %v: wait %v, want %v", c.took, got, c.want)
		}
	}
	var p Pace
	p.Time(func() { time.Sleep(5 * time.Millisecond) })
	if got, least := p.Wait(), paceRatio*5*time.Millisecond; got < least {
		t.Errorf("after a look of 5 ms and more: wait %v, want at least %v", got, least)
	}
}
