package sched

// Waiting says whether the work waits for a turn or for bytes at this moment: what it
// brings is not late then, nobody has been asked for it.
func (w *Work) Waiting() bool {
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.waits) > 0
}

// Place says where the class of f is among all n of them, the most important one
// being 0. Without a Scheduler, and when that is off, there is one class.
func (s *Scheduler) Place(f *Flow) (place, n int) {
	if s == nil || s.cfg.Off {
		return 0, 1
	}
	if f == nil || f.class == nil {
		f = s.orphan
	}
	return f.order, len(s.classes)
}
