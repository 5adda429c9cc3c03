package vhostuser

import (
	"slices"
	"testing"
)

func newTestRecord(num int) *inflight { return &inflight{b: make([]byte, inflightBytes(num))} }

// A process may end after each step of an answer. The used index in the guest's
// memory says whether the guest has it.
func TestEndBetweenSteps(t *testing.T) {
	const num, head = 8, 5
	for steps, want := range [][]uint16{{2, head, 1}, {2, head, 1}, {2, 1}, {2, 1}, {2, 1}} {
		r := newTestRecord(num)
		used := uint16(65535) // it wraps
		if heads, resumed := r.resume(num, used); resumed || heads != nil {
			t.Fatalf("a new record: %v, %t", heads, resumed)
		}
		for _, h := range []uint16{2, head, 1} {
			r.take(h)
		}
		for _, step := range []func(){
			func() { r.answering(head, used) },
			func() { used++ }, // ring.setUsedIdx
			func() { *r.entry(head) = 0 },
			func() { r.answered(head, used) },
		}[:steps] {
			step()
		}
		next := &inflight{b: r.b}
		for range 2 { // the next process may end before it does anything
			if heads, resumed := next.resume(num, used); !resumed || !slices.Equal(heads, want) {
				t.Errorf("end after %d steps: %v, %t", steps, heads, resumed)
			}
		}
		next.take(7)
		if heads, _ := (&inflight{b: r.b}).resume(num, used); heads[len(heads)-1] != 7 {
			t.Errorf("end after %d steps: the chain taken last is not the last of %v", steps, heads)
		}
	}
}

func TestAnotherSizeIsAnotherRing(t *testing.T) {
	r := newTestRecord(16)
	r.resume(16, 0)
	r.take(3)
	if heads, resumed := r.resume(8, 0); resumed || heads != nil || r.taken(3) {
		t.Errorf("%v, %t", heads, resumed)
	}
}

// What the process before has left may be anything.
func FuzzResume(f *testing.F) {
	const num = 16
	r := newTestRecord(num)
	r.resume(num, 7)
	r.take(3)
	r.take(9)
	r.answering(9, 7)
	f.Add(r.b, uint16(7))
	f.Add(r.b, uint16(8))
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, used uint16) {
		r := newTestRecord(num)
		copy(r.b, b)
		heads, _ := r.resume(num, used)
		slices.Sort(heads)
		if len(heads) > 0 && heads[len(heads)-1] >= num || len(slices.Compact(heads)) != len(heads) {
			t.Errorf("heads %v", heads)
		}
		again, resumed := r.resume(num, used)
		slices.Sort(again)
		if !resumed || !slices.Equal(heads, again) {
			t.Errorf("heads %v, then %v", heads, again)
		}
	})
}

func FuzzInflightArea(f *testing.F) {
	a := inflightArea{size: uint64(2 * inflightBytes(64)), queues: 2, queueSize: 64}
	f.Add(a.encode())
	f.Fuzz(func(t *testing.T, p []byte) {
		a, err := parseInflight(p)
		if err == nil && a.size < uint64(a.queues)*uint64(inflightBytes(int(a.queueSize))) {
			t.Errorf("%+v", a)
		}
	})
}
