package sched

import (
	"math"
	"time"
)

const ranks = int(Background) + 1

// ticket is one wait for a turn or for bytes.
type ticket struct {
	work   *Work
	queue  waiting
	want   int64 // units
	seq    uint64
	since  time.Duration
	real   Standing      // whom it is for; its flow is never nil
	acct   *account      // where it waits; nil when it does not
	index  int           // in acct
	got    int64         // units granted; 0 while it waits
	ready  chan struct{} // closed when something is granted, if somebody made it
	turn   turn
	charge charge // what was granted, for corrections
}

// charge is on whom units were charged.
type charge struct {
	flow *Flow
	rank Rank
}

// account is a flow in a rank.
type account struct {
	flow  *Flow
	vt    float64 // virtual time: units until the start of its next grant
	wait  heap[*ticket]
	index int           // among those that wait, or among those that do not
	idle  time.Duration // since when nothing waits
}

// level is a rank of a class.
type level struct {
	vt       float64 // start of the latest grant
	accounts map[*Flow]*account
	waiting  heap[*account]
	idle     heap[*account]
	tickets  int
}

// forgetAfter is how long a flow that wants nothing is remembered. It only has to be
// longer than the time between two reads of a connection.
const forgetAfter = time.Second

// tiers share a queue by weight, and classes share each tier: what somebody waits for or
// will soon, and below it what nobody has asked for.
const tiers = 2

// tier is where work of this rank competes.
func (r Rank) tier() int { return int(min(r, Background) / Background) }

// tier is one of them in a queue.
type tier struct {
	weight float64
	next   float64 // units / weight until the start of its next grant
	vt     float64 // of classes: start of the latest grant in it
}

// share is a class in a queue.
type share struct {
	class          *Class
	vt             [tiers]float64 // units / Class.Share until the start of its next grant
	asked          time.Duration  // when it last got what was no background work; 0: never
	levels         [ranks]level
	floor, ceiling meter
	tally          tally
}

// core is the order of a queue.
type core struct {
	shares    []*share        // by importance
	orphan    *Flow           // of work that has none
	contended bool            // several classes want something
	top       peak            // what is most important of what is wanted
	least     meter           // what all below it get together whatever top takes, where that matters
	lesser    meter           // of all below it together
	bytes     bool            // ceilings in bytes a second hold here
	percent   bool            // ceilings in per cent hold here
	granted   func(t *ticket) // is told of each grant
	off       bool            // who came first goes first
	tiers     [tiers]tier
	vt        float64 // of tiers: start of the latest grant
	seq       uint64
	waiting   int
}

// peak is a class, of which background work may be below it, too.
type peak struct {
	class  int
	urgent bool // it wants something else than that, beside another class
}

// over says whether work of a class and rank is below the peak.
func (p peak) over(class int, r Rank) bool {
	return class > p.class || p.urgent && r == Background
}

// newCore returns an empty core. Work of off cores has one order, whatever its class.
func newCore(classes []*Class, orphan *Flow, off bool) core {
	c := core{orphan: orphan, off: off, tiers: weigh(classes)}
	for _, class := range classes {
		s := &share{class: class}
		for i := range s.levels {
			s.levels[i] = newLevel()
		}
		c.shares = append(c.shares, s)
	}
	return c
}

// weigh gives background work the weight of the least class of all, the rest of their
// sum to what is urgent.
func weigh(classes []*Class) (t [tiers]tier) {
	sum, least := 0, math.MaxInt
	for _, class := range classes {
		sum, least = sum+class.Share, min(least, class.Share)
	}
	t[Demand.tier()].weight = float64(max(sum-least, least))
	t[Background.tier()].weight = float64(least)
	return t
}

func newLevel() level {
	place := func(a *account) *int { return &a.index }
	return level{
		accounts: map[*Flow]*account{},
		waiting:  heap[*account]{place: place, less: func(a, b *account) bool { return a.earlier(b) }},
		idle:     heap[*account]{place: place, less: func(a, b *account) bool { return a.idle < b.idle }},
	}
}

// earlier is the order of flows in a rank.
func (a *account) earlier(b *account) bool {
	if a.vt != b.vt {
		return a.vt < b.vt
	}
	return a.wait.items[0].seq < b.wait.items[0].seq
}

// put lets t wait, for whom s says.
func (c *core) put(t *ticket, s Standing, now time.Duration) {
	if t.seq == 0 {
		c.seq++
		t.seq, t.since = c.seq, now
	}
	if f := s.Flow; f == nil || f.order >= len(c.shares) || f.class != c.shares[f.order].class {
		s.Flow = c.orphan
	}
	s.Rank = min(s.Rank, Background)
	t.real = s
	_, _, lv := c.where(s)
	lv.forget(now)
	lv.add(c.key(s), t)
	c.shares[s.Flow.order].tally.waiting[s.Rank]++
	c.waiting++
}

// where is the class, its tier and its rank in which s waits and is charged.
func (c *core) where(s Standing) (sh *share, tier int, lv *level) {
	if c.off {
		return c.shares[0], 0, &c.shares[0].levels[0]
	}
	sh = c.shares[s.Flow.order]
	return sh, s.Rank.tier(), &sh.levels[s.Rank]
}

func (c *core) key(s Standing) *Flow {
	if c.off {
		return c.orphan
	}
	return s.Flow
}

// drop takes t out.
func (c *core) drop(t *ticket, now time.Duration) {
	_, _, lv := c.where(t.real)
	lv.remove(t, now)
	c.shares[t.real.Flow.order].tally.waiting[t.real.Rank]--
	c.waiting--
}

func (l *level) account(f *Flow) *account {
	a := l.accounts[f]
	if a == nil {
		a = &account{flow: f, wait: heap[*ticket]{
			place: func(t *ticket) *int { return &t.index },
			less:  func(a, b *ticket) bool { return a.seq < b.seq },
		}}
		l.accounts[f] = a
		l.idle.push(a)
	}
	return a
}

func (l *level) add(f *Flow, t *ticket) {
	a := l.account(f)
	t.acct = a
	l.tickets++
	a.wait.push(t)
	if a.wait.len() > 1 {
		l.waiting.fix(a) // t may be older than the first
		return
	}
	l.idle.remove(a)
	a.vt = max(a.vt, l.vt) // what it did not use is gone
	l.waiting.push(a)
}

func (l *level) remove(t *ticket, now time.Duration) {
	a := t.acct
	t.acct = nil
	l.tickets--
	if a.wait.len() > 1 {
		a.wait.remove(t)
		l.waiting.fix(a)
		return
	}
	l.waiting.remove(a)
	a.wait.remove(t)
	a.idle = now
	l.idle.push(a)
}

// forget drops the accounts of flows that have wanted nothing for a while.
func (l *level) forget(now time.Duration) {
	for l.idle.len() > 0 && l.idle.items[0].idle+forgetAfter < now {
		a := l.idle.items[0]
		l.idle.remove(a)
		delete(l.accounts, a.flow)
	}
}

// first is the ticket that goes first among those that may go, nil when there is none.
// floor says that it goes because of its class's floor. wake is when a ceiling lets the
// next one go; 0 when no ceiling is in the way.
func (c *core) first(now time.Duration, may func(class int, r Rank) bool) (t *ticket, floor bool, wake time.Duration) {
	var best *share
	var bestRank int
	var behind float64 // seconds that best is below its floor
	for i, s := range c.shares {
		r := s.first()
		if r == ranks || may != nil && !may(i, Rank(r)) {
			continue
		}
		at := s.ceiling.blocked(now)
		if c.top.over(i, Rank(r)) {
			at = max(at, c.lesser.blocked(now))
		}
		if at > 0 {
			if wake == 0 || at < wake {
				wake = at
			}
			continue
		}
		b := s.behind(now)
		if best == nil || b > behind || b == 0 && behind == 0 && c.sooner(s, Rank(r), best, Rank(bestRank)) {
			best, bestRank, behind = s, r, b
		}
	}
	if best == nil {
		return nil, false, wake
	}
	return best.levels[bestRank].waiting.items[0].wait.items[0], behind > 0, wake
}

// sooner says whether what a wants is behind what b wants, by shares.
func (c *core) sooner(a *share, r Rank, b *share, q Rank) bool {
	i, k := r.tier(), q.tier()
	if i != k {
		one, other := max(c.tiers[i].next, c.vt), max(c.tiers[k].next, c.vt)
		return one < other || one == other && i < k
	}
	vt := c.tiers[i].vt
	return max(a.vt[i], vt) < max(b.vt[i], vt)
}

// first is the most urgent rank in which something waits; ranks when nothing does.
func (s *share) first() int {
	for r := range s.levels {
		if s.levels[r].tickets > 0 {
			return r
		}
	}
	return ranks
}

// behind is how many seconds of its floor the class has to get; 0 when it is not below.
func (s *share) behind(now time.Duration) float64 {
	if s.floor.rate == 0 {
		return 0
	}
	s.floor.refill(now)
	return max(s.floor.tokens, 0) / s.floor.rate
}

// grant takes t out and charges n units for it.
func (c *core) grant(t *ticket, n int64, floor bool, now time.Duration) {
	sh, k, lv := c.where(t.real)
	a := t.acct
	pass(&c.tiers[k].next, &c.vt, float64(n)/c.tiers[k].weight, floor)
	pass(&sh.vt[k], &c.tiers[k].vt, float64(n)/float64(sh.class.Share), floor)
	lv.vt = max(lv.vt, a.vt)
	a.vt += float64(n)
	c.drop(t, now)
	c.meter(sh, k, n)
	t.got, t.charge = n, charge{t.real.Flow, t.real.Rank}
	c.shares[t.real.Flow.order].tally.granted(n, now-t.since, now)
	if t.real.Rank < Background {
		c.shares[t.real.Flow.order].asked = now
	}
	if t.ready != nil {
		close(t.ready)
	}
	if c.granted != nil {
		c.granted(t)
	}
}

// pass takes a grant, which lasts for d, of who competes with others: next is its next
// start, vt the start of the latest grant of all.
func pass(next, vt *float64, d float64, floor bool) {
	if floor { // nobody else's turn has passed
		*next = max(*next, *vt+d)
		return
	}
	*vt = max(*next, *vt)
	*next = *vt + d
}

// contendedTime is how long a class that got something counts as one that wants more.
const contendedTime = 10 * time.Second

// contend finds the most important class that wants something, background work coming
// after all else, and whether others do.
func (c *core) contend(now time.Duration) bool {
	n, urgent := 0, false
	for i, s := range c.shares {
		if s.first() == ranks && (s.tally.total == 0 || now-s.tally.lately.at >= contendedTime) {
			continue
		}
		asks := s.asks(now)
		if n++; n == 1 || asks && !urgent {
			c.top.class, urgent = i, asks
		}
	}
	c.contended = n > 1
	c.top.urgent = urgent && c.contended
	return c.contended
}

// asks says whether the class wants something that is no background work, or did a
// moment ago.
func (s *share) asks(now time.Duration) bool {
	return s.first() < int(Background) || s.asked > 0 && now-s.asked < contendedTime
}

// limitLesser lets all below the most important that is wanted have rate units a second
// together; 0: no such limit.
func (c *core) limitLesser(rate float64, now time.Duration) {
	if rate != c.lesser.rate {
		c.lesser = meter{rate: rate, at: now}
	}
}

// meter counts n units of a class and tier against its bounds.
func (c *core) meter(s *share, tier int, n int64) {
	s.floor.owe(n)
	if s.ceiling.rate > 0 {
		s.ceiling.tokens -= float64(n)
	}
	if s == c.shares[c.top.class] && (!c.top.urgent || tier != Background.tier()) {
		return
	}
	if c.lesser.rate > 0 {
		c.lesser.tokens -= float64(n)
	}
	c.least.owe(n)
}

// correct charges n more units than were granted, or fewer when n is negative.
func (c *core) correct(ch charge, n int64, now time.Duration) {
	s := Standing{ch.flow, ch.rank}
	sh, k, lv := c.where(s)
	c.tiers[k].next += float64(n) / c.tiers[k].weight
	sh.vt[k] += float64(n) / float64(sh.class.Share)
	c.meter(sh, k, n)
	lv.correct(c.key(s), float64(n), now)
	c.shares[ch.flow.order].tally.add(n, now)
}

func (l *level) correct(f *Flow, n float64, now time.Duration) {
	a := l.accounts[f]
	if a == nil && n <= 0 {
		return // what was charged is forgotten, too
	}
	if a == nil {
		a = l.account(f)
		a.vt = l.vt
	}
	a.vt += n
	if a.wait.len() > 0 {
		l.waiting.fix(a)
		return
	}
	a.idle = now
	l.idle.fix(a)
}

// move lets t wait for whom s says.
func (c *core) move(t *ticket, s Standing, now time.Duration) {
	before := t.real.Flow.order
	c.drop(t, now)
	c.put(t, s, now)
	if after := t.real.Flow.order; after < before {
		c.shares[after].tally.promoted++
	}
}

// bounds sets floors and ceilings for a queue that hands out rate units a second; 0 when
// that is not known.
func (c *core) bounds(rate float64) {
	sum := 0.0
	for _, s := range c.shares {
		s.floor.rate = s.class.Floor.of(rate)
		s.ceiling.rate = 0
		if c.bytes && s.class.Ceiling.Bytes > 0 || c.percent && s.class.Ceiling.Percent > 0 {
			s.ceiling.rate = s.class.Ceiling.of(rate)
		}
		sum += s.floor.rate
	}
	if most := rate * maxFloors; rate > 0 && sum > most {
		for _, s := range c.shares {
			s.floor.rate *= most / sum
		}
	}
}

// maxFloors is the part of a queue that floors may promise: the rest is for those that
// have none.
const maxFloors = 0.95

// of is the rate in units a second of a queue that hands out total; 0: none.
func (r Rate) of(total float64) float64 { return float64(r.Bytes) + r.Percent/100*total }
