package sched

import "testing"

// TestFollow has an image that a batch sandbox prepares, and one layer of it that
// another image needs as well.
func TestFollow(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	online, batch := s.Flow("online", "o"), s.Flow("batch", "b")
	caller := NewWork(Standing{batch, Demand})
	image, layer := NewShared(), NewShared()
	leaveImage := image.Follow(caller)
	leaveLayer := layer.Follow(image)
	check := func(what string, w *Work, want Standing) {
		t.Helper()
		if got := w.Standing(); got != want {
			t.Errorf("%s: standing %s %s, want %s %s", what, got.Flow.Class().Name, got.Rank, want.Flow.Class().Name, want.Rank)
		}
	}
	check("begun", layer, Standing{batch, Demand})

	caller.Promote(Standing{online, Prefetch})
	check("its caller is promoted", layer, Standing{online, Prefetch})
	caller.Set(Standing{batch, Demand})
	check("and restored", layer, Standing{batch, Demand})

	urgent := NewWork(Standing{online, Demand})
	leaveUrgent := image.Follow(urgent)
	check("somebody online joins the image", layer, Standing{online, Demand})
	leaveImage()
	check("who began has gone", layer, Standing{online, Demand})

	other := NewWork(Standing{batch, Prefetch})
	leaveOther := layer.Follow(other)
	leaveLayer()
	check("only another image wants the layer", layer, Standing{batch, Prefetch})
	urgent.Promote(Standing{online, Demand})
	check("who was left has no say", layer, Standing{batch, Prefetch})
	leaveUrgent()
	leaveOther()
	if len(urgent.followers) > 0 || len(image.leaders) > 0 || len(layer.leaders) > 0 {
		t.Error("somebody is still followed")
	}
}

// TestFollowMoves has work wait for a turn while what it follows is promoted.
func TestFollowMoves(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	turns := s.Turns("one", 1)
	leave, err := turns.Enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	caller := NewWork(Standing{s.Flow("batch", "b"), Demand})
	job := NewShared()
	defer job.Follow(caller)()
	order := make(chan string, 2)
	enter := func(name string, w *Work) {
		leave, err := turns.Enter(With(t.Context(), w))
		if err != nil {
			t.Error(err)
		}
		order <- name
		leave()
	}
	waiting := func(n int) {
		for {
			turns.mu.Lock()
			got := turns.turns.waiting
			turns.mu.Unlock()
			if got == n {
				return
			}
		}
	}
	go enter("other", NewWork(Standing{s.Flow("online", "a"), Prefetch}))
	waiting(1)
	go enter("job", job)
	waiting(2)
	caller.Promote(Standing{s.Flow("online", "b"), Demand})
	leave()
	if first, second := <-order, <-order; first != "job" || second != "other" {
		t.Errorf("%s goes before %s", first, second)
	}
}
