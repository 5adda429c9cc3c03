package isolation

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Kinds of faults, by where the page is.
const (
	atRegistry = iota
	onNode
	inMemory
	kindsOfFaults
)

var kindNames = [kindsOfFaults]string{"at the registry", "on the node", "in memory"}

// Blocks within which a page is the first that is read: what a read brings with it.
const (
	registryBlock = 1 << 20
	nodeBlock     = 64 << 10
	page          = 4 << 10
)

// probeJob reads pages of mapped files at given rates.
type probeJob struct {
	Registry, Node []string // files that are there, and there
	Rates          [kindsOfFaults]int
}

// defaultRates a second; see the package's documentation.
var defaultRates = [kindsOfFaults]int{8, 40, 952}

// fault is one page that was read.
type fault struct {
	Kind int
	At   int64 // unix time, nanoseconds
	Took int64 // nanoseconds
}

// probeResult lists them in the order in which they were answered.
type probeResult struct {
	Faults []fault
	Errors int // SIGBUS: the kernel had an input/output error
	Blocks [2]int
	Out    bool // a kind had no pages left
}

func now() int64 { return time.Now().UnixNano() }

// spot is a page.
type spot struct {
	mem  []byte
	kind int
	at   int
}

// prober reads pages in threads of its own: one that waits for a page waits in the kernel.
type prober struct {
	job    probeJob
	blocks [2][]spot // not read yet, in the order in which they will be
	warm   []spot    // read; protected by mu as all below
	mu     sync.Mutex
	result probeResult
}

// probers is how many pages may be waited for at a time.
const probers = 48

func (j probeJob) run(stop <-chan struct{}) (*probeResult, error) {
	runtime.GOMAXPROCS(probers + 8) // a page fault keeps a processor of Go's scheduler
	debug.SetGCPercent(-1)          // stopping the world would wait for all of them
	debug.SetPanicOnFault(true)
	p := &prober{job: j}
	for kind, files := range [][]string{j.Registry, j.Node} {
		for _, name := range files {
			if err := p.add(kind, name, []int{registryBlock, nodeBlock}[kind]); err != nil {
				return nil, err
			}
		}
		shuffle := rand.New(rand.NewPCG(1, uint64(kind)))
		shuffle.Shuffle(len(p.blocks[kind]), func(a, b int) {
			p.blocks[kind][a], p.blocks[kind][b] = p.blocks[kind][b], p.blocks[kind][a]
		})
		p.result.Blocks[kind] = len(p.blocks[kind])
	}
	p.result.Faults = make([]fault, 0, 1<<20)
	work := make(chan spot)
	var wg sync.WaitGroup
	for range probers {
		wg.Go(func() { p.work(work) })
	}
	p.dispatch(work, stop)
	close(work)
	wg.Wait()
	return &p.result, nil
}

func (p *prober) add(kind int, name string, block int) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", name, err)
	}
	if err := unix.Madvise(mem, unix.MADV_RANDOM); err != nil {
		return fmt.Errorf("advise on %s: %w", name, err)
	}
	src := rand.New(rand.NewPCG(uint64(len(p.blocks[kind])), 2))
	for off := 0; off+block <= len(mem); off += block {
		p.blocks[kind] = append(p.blocks[kind], spot{mem, kind, off + src.IntN(block/page)*page})
	}
	return nil
}

// dispatch hands pages out when they are due until stop is closed.
func (p *prober) dispatch(work chan<- spot, stop <-chan struct{}) {
	var next [kindsOfFaults]time.Time
	for k := range next {
		next[k] = time.Now()
	}
	for {
		kind := 0
		for k := range next {
			if p.job.Rates[k] > 0 && (p.job.Rates[kind] == 0 || next[k].Before(next[kind])) {
				kind = k
			}
		}
		select {
		case <-stop:
			return
		case <-time.After(time.Until(next[kind])):
		}
		next[kind] = next[kind].Add(time.Second / time.Duration(p.job.Rates[kind]))
		if s, ok := p.pick(kind); ok {
			work <- s
		}
	}
}

// pick chooses the page of the next fault of a kind.
func (p *prober) pick(kind int) (spot, bool) {
	if kind == inMemory {
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.warm) == 0 {
			return spot{}, false
		}
		s := p.warm[rand.IntN(len(p.warm))]
		s.kind = inMemory
		return s, true
	}
	if len(p.blocks[kind]) == 0 {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.result.Out = true
		return spot{}, false
	}
	s := p.blocks[kind][0]
	p.blocks[kind] = p.blocks[kind][1:]
	return s, true
}

func (p *prober) work(work <-chan spot) {
	runtime.LockOSThread()
	for s := range work {
		if s.kind == inMemory { // so that it faults once more
			_ = unix.Madvise(s.mem[s.at:s.at+page], unix.MADV_DONTNEED) // of a mapping that there is
		}
		began := time.Now()
		ok := touch(s)
		f := fault{Kind: s.kind, At: began.UnixNano(), Took: int64(time.Since(began))}
		p.mu.Lock()
		p.result.Faults = append(p.result.Faults, f)
		if !ok {
			p.result.Errors++
		} else if s.kind != inMemory {
			p.warm = append(p.warm, s)
		}
		p.mu.Unlock()
	}
}

// sum keeps the compiler from leaving reads out.
var sum byte

// touch reads a byte of the page and tells whether the kernel could give it.
func touch(s spot) (ok bool) {
	debug.SetPanicOnFault(true) // of this goroutine
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	sum ^= s.mem[s.at]
	return true
}

// times of the faults of some kinds, in milliseconds, sorted.
func (r *probeResult) times(kinds ...int) (all []float64) {
	for _, f := range r.Faults {
		if slices.Contains(kinds, f.Kind) {
			all = append(all, float64(f.Took)/1e6)
		}
	}
	slices.Sort(all)
	return all
}

// quantile is the smallest value that a share q of sorted values does not exceed.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// spinJob computes at fixed intervals, and sees how much of the processor others take.
type spinJob struct {
	Every time.Duration // of the beginnings
	Units int           // how much is computed each time
}

// spinResult has how long each took, in nanoseconds.
type spinResult struct{ Took []int64 }

func (j spinJob) run(stop <-chan struct{}) (r spinResult) {
	runtime.LockOSThread()
	tick := time.NewTicker(j.Every)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return r
		case <-tick.C:
		}
		began := time.Now()
		x := uint32(1)
		for range j.Units {
			x = x*1664525 + 1013904223
		}
		sum ^= byte(x)
		r.Took = append(r.Took, int64(time.Since(began)))
	}
}
