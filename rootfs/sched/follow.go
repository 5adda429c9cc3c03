package sched

import "slices"

// NewShared returns work that is done once for several others. It counts as the first
// of those that it follows.
func NewShared() *Work { return &Work{shared: true} }

// Follow lets w count as by does, if that comes first, now and whenever by is promoted
// later, until end is called. A nil by is work of the default class, of rank Demand.
// Work does not follow itself, not by way of others either, and work that
// follows is not promoted besides.
func (w *Work) Follow(by *Work) (end func()) {
	if by == nil {
		by = NewWork(Standing{})
	}
	by.mu.Lock()
	by.followers = append(by.followers, w)
	by.mu.Unlock()
	w.mu.Lock()
	w.leaders = append(w.leaders, by)
	w.mu.Unlock()
	w.recount()
	return func() { w.unfollow(by) }
}

func (w *Work) unfollow(by *Work) {
	by.mu.Lock()
	by.followers = without(by.followers, w)
	by.mu.Unlock()
	w.mu.Lock()
	w.leaders = without(w.leaders, by)
	w.mu.Unlock()
	w.recount()
}

// without returns list less one w. It leaves list, which others may be reading.
func without(list []*Work, w *Work) []*Work {
	i := slices.Index(list, w)
	if i < 0 {
		return list
	}
	return append(slices.Clone(list[:i]), list[i+1:]...)
}

// recount finds the standing that w has because of others. The locks of works are
// taken from followers to leaders.
func (w *Work) recount() {
	w.change(func(now Standing) (Standing, bool) {
		first, found := w.base, !w.shared
		for _, l := range w.leaders {
			if s := l.Standing(); !found || s.Before(first) {
				first, found = s, true
			}
		}
		return first, found && first != now
	})
}
