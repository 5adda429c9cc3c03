package isolation

import (
	"slices"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/link"
)

// once fails when bytes of an image were asked for twice. The first request of a layer
// is for its table of contents, and for some bytes before that, as nobody knows its size.
func (s *site) once(t *testing.T, name string) {
	t.Helper()
	for _, p := range s.repos[name] {
		for _, l := range p.Layers {
			requests := s.Requests(l.Digest.String())
			if len(requests) == 0 {
				continue
			}
			if err := registrytest.Once(requests[1:], l.Size); err != nil {
				t.Error(err)
			}
		}
	}
}

// Whatever the node does to be fair, nothing is fetched twice, and everybody gets all
// that is read: sandboxes of both classes that read one image in different orders, and
// batch ones of another.
func TestNothingTwice(t *testing.T) {
	need(t)
	for _, a := range []arm{unprotected, protected} {
		t.Run(a.name, func(t *testing.T) {
			s := newSite(t, link.Shape{Rate: 20e6, RTT: time.Millisecond})
			both, other := ofSize("both", 8<<20, 256<<10), ofSize("other", 8<<20, 256<<10)
			s.push("both", both.layers(t, "both", lazy)...)
			s.push("batch", other.layers(t, "other", lazy)...)
			n := newNode(t, a, s, noFill)
			s.limit(true)
			st := n.newStorm(t, "batch", 2, s.ref("batch"), other.names())
			backwards := both.names()
			slices.Reverse(backwards)
			st.add(n.launch(t, "batch"), s.ref("both"), both.names())
			st.add(n.launch(t, "online"), s.ref("both"), backwards)
			r, err := st.run(t.Context())
			check(t, err)
			if want := 2*both.total() + other.total(); r.bytes != want || len(r.errors) > 0 {
				t.Errorf("%d bytes were read, want %d; errors %v", r.bytes, want, r.errors)
			}
			// Who reads on far ahead of others has a stream of its own: the one before ends there,
			// and what is on its way then is lost.
			for _, name := range []string{"both", "batch"} {
				if sent, _ := s.sent(name); sent > s.size(name)*3/2 {
					t.Errorf("%d bytes of %s were sent, it has %d", sent, name, s.size(name))
				}
			}
		})
	}
}

// await waits until so many bytes of an image have been sent.
func (s *site) await(t *testing.T, name string, bytes int64) {
	t.Helper()
	eventually(t, name+" is read", func() bool {
		sent, _ := s.sent(name)
		return sent >= bytes
	})
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// A chunk that batch is fetching and that online needs is promoted: it is there while
// most of what batch began before it is not, and it is not fetched twice.
func TestPromotion(t *testing.T) {
	need(t)
	s := newSite(t, link.Shape{Rate: 2e6})
	both, big := ofSize("both", 16<<20, registryBlock), ofSize("big", 16<<20, 1<<20)
	s.push("both", both.layers(t, "both", lazy)...)
	s.push("batch", big.layers(t, "big", lazy)...)
	a := protected
	a.settings = "[schedule]\nlink = \"16mbit\"\n"
	n := newNode(t, a, s, noFill)
	online, batch := n.newSandbox(t, "online"), n.newSandbox(t, "batch")
	check(t, online.pull(t.Context(), s.ref("both")))
	check(t, batch.pull(t.Context(), s.ref("both")))
	s.limit(true)
	end := n.newStorm(t, "batch", 4, s.ref("batch"), big.names()).begin()
	s.await(t, "batch", 1<<20)
	first, second := batch.newToucher(t), online.newToucher(t)
	for _, i := range []int{12, 8, 4, 0} { // so that nothing is read ahead
		name := both.names()[i]
		_, asked := s.sent("both")
		done := make(chan error, 1)
		go func() {
			_, err := first.touch(name, batchPage)
			done <- err
		}()
		eventually(t, name+" is asked for", func() bool {
			_, now := s.sent("both")
			return now > asked
		})
		_, err := second.touch(name, onlinePage)
		check(t, err)
		check(t, <-done)
	}
	sent, _ := s.sent("batch")
	_, err := end()
	check(t, err)
	if promoted := n.promoted(t); promoted == 0 {
		t.Error("no work was promoted")
	}
	if sent > big.total()*3/4 {
		t.Errorf("before online had its pages, batch had got %d bytes of %d", sent, big.total())
	}
	s.once(t, "both")
}

// The node's daemon is killed while a storm and an online sandbox read: all of them read
// on with the next one, and no read fails.
func TestKilledInTheStorm(t *testing.T) {
	need(t)
	s := newSite(t, link.Shape{Rate: 10e6})
	on, big := ofSize("on", 8<<20, 1<<20), ofSize("big", 24<<20, 1<<20)
	s.push("online", on.layers(t, "on", lazy)...)
	s.push("batch", big.layers(t, "big", lazy)...)
	n := newNode(t, protected, s, noFill)
	st := n.newStorm(t, "batch", 4, s.ref("batch"), big.names())
	st.add(n.launch(t, "online"), s.ref("online"), on.names())
	s.limit(true)
	end := st.begin()
	for _, b := range st.boxes {
		eventually(t, b.id+" has its image", b.there.Load)
	}
	s.await(t, "batch", 4<<20)
	n.crash()
	r, err := end()
	check(t, err)
	if want := on.total() + big.total(); r.bytes != want || len(r.errors) > 0 {
		t.Errorf("%d bytes were read, want %d; errors %v", r.bytes, want, r.errors)
	}
}

func TestFigures(t *testing.T) {
	sorted := []float64{1, 2, 3, 4}
	for q, want := range map[float64]float64{0: 1, 0.5: 3, 0.99: 4, 1: 4} {
		if got := quantile(sorted, q); got != want {
			t.Errorf("quantile %v of %v: %v, want %v", q, sorted, got, want)
		}
	}
	at := func(ms int, online, batch int64) sample {
		return sample{time.UnixMilli(int64(ms)), online, batch}
	}
	got := parts([]sample{at(0, 0, 0), at(100, 30, 10), at(200, 30, 10), at(300, 30, 20)})
	if want := []float64{0, 75}; !slices.Equal(got, want) {
		t.Errorf("parts %v, want %v: a sample in which nothing was sent has none", got, want)
	}
	for v, want := range map[float64]string{0: "0 ms", 12: "12 ms", 0.1234: "0.123 ms", 12.345: "12.3 ms", 1234.5: "1234 ms"} {
		if got := number(v, "ms"); got != want {
			t.Errorf("number %v: %q, want %q", v, got, want)
		}
	}
	r := probeResult{Faults: []fault{{onNode, 100, 50}, {onNode, 200, 10}, {atRegistry, 300, 5}}}
	if got := r.after(onNode, time.Unix(0, 150)); got != 60 {
		t.Errorf("the first page that is asked for at 150 is there %d later, want 60", got)
	}
	r.cut(time.Unix(0, 150), time.Unix(0, 250))
	if len(r.Faults) != 1 || r.Faults[0].At != 200 {
		t.Errorf("faults between 150 and 250: %+v", r.Faults)
	}
}
