package sched

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A turn that is not left ends by itself; leaving it late or twice does nothing.
func TestBrief(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	q := newSlots("one", 1, s)
	late, err := q.Brief(t.Context(), time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	w := NewWork(Standing{})
	leave, err := q.Brief(With(t.Context(), w), time.Hour) // waits for the first one to end
	if err != nil {
		t.Fatal(err)
	}
	late()
	over, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := q.Enter(over); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("there are two turns: %v", err)
	}
	leave()
	leave()
	end, err := q.Enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		leave, err := q.Enter(With(t.Context(), w))
		leave()
		done <- err
	}()
	for !w.Waiting() {
		time.Sleep(time.Millisecond)
	}
	end()
	if err := <-done; err != nil || w.Waiting() {
		t.Errorf("%v, waiting: %v", err, w.Waiting())
	}
	if leave, err := (*Slots)(nil).Brief(t.Context(), 1); err != nil {
		t.Error(err)
	} else {
		leave()
	}
}

func TestPlace(t *testing.T) {
	s, err := New(Config{Classes: []Class{{Name: "a", Share: 1}, {Name: "b", Share: 1}, {Name: "c", Share: 1}}, Default: "b"})
	if err != nil {
		t.Fatal(err)
	}
	off, err := New(Config{Off: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		s        *Scheduler
		flow     *Flow
		place, n int
	}{
		{s, s.Flow("a", "x"), 0, 3}, {s, s.Flow("c", "x"), 2, 3}, {s, s.Flow("z", "x"), 1, 3}, {s, nil, 1, 3},
		{s, (*Scheduler)(nil).Flow("a", "x"), 1, 3}, {off, off.Flow("batch", "x"), 0, 1}, {nil, nil, 0, 1},
	} {
		if place, n := tc.s.Place(tc.flow); place != tc.place || n != tc.n {
			t.Errorf("%q: %d of %d, want %d of %d", tc.flow.Class().Name, place, n, tc.place, tc.n)
		}
	}
}
