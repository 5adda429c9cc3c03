// Command sandboxes compares the ways in which an image comes into virtual
// machines of one node:
//
//	sandboxes [-rounds N] [-vms 1,2,4] [-link 1gbit,5ms]
//
// virtio-fs and the relay, lazily, and a full pull inside the guest. For each way
// it starts machines one after the other, on a node that has nothing before the
// first; then the container of each reads every file of the image twice. It prints
// medians in seconds, and the host's memory in MiB: what QEMU and our programs have,
// shared pages counted once, and the page cache of the node's directory. It wants
// root, QEMU and our programs in PATH.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"
	"strings"

	"github.com/tatami-containers/tatami/tools/link"
	"github.com/tatami-containers/tatami/tools/run"
)

// way is how the image comes into the guest, and what the report has to call it.
type way struct{ name, mode, source, reported string }

// The one that the others are compared with is the last.
var ways = []way{
	{"virtio-fs", run.Lazy, run.SourceVirtioFS, "virtio-fs"},
	{"relay over vsock", run.Lazy, run.SourceRelay, "relay"},
	{"full pull", run.Full, run.SourceAuto, "registry"},
}

func main() {
	log.SetFlags(0)
	rounds := flag.Int("rounds", 1, "how often every way is measured")
	vms := flag.String("vms", "1,2,4", "numbers of machines at which the host's memory is measured, ascending")
	shape := flag.String("link", "1gbit,5ms", "the link to the registry")
	flag.Parse()
	counts, err := numbers(*vms)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err == nil {
		err = compare(ctx, *rounds, counts, *shape)
	}
	if err != nil {
		log.Fatal("sandboxes: ", err)
	}
}

func numbers(list string) (counts []int, err error) {
	for word := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 || len(counts) > 0 && n <= counts[len(counts)-1] {
			return nil, fmt.Errorf("-vms %q: want ascending numbers, 1 or more", list)
		}
		counts = append(counts, n)
	}
	return counts, nil
}

func compare(ctx context.Context, rounds int, counts []int, shape string) error {
	s, err := link.ParseShape(shape)
	if err != nil {
		return err
	}
	reg, err := newRegistry(ctx, s)
	if err != nil {
		return err
	}
	results := map[string]figures{}
	for _, w := range ways {
		results[w.name] = figures{}
	}
	if err := errors.Join(alternate(ctx, reg, rounds, counts, results), reg.close()); err != nil {
		return err
	}
	fmt.Printf("An image of %d MB, unpacked; guests of %d MiB.\n\n", reg.size/1e6, guestMemory)
	write(os.Stdout, results, counts)
	return nil
}

func alternate(ctx context.Context, reg *registry, rounds int, counts []int, results map[string]figures) error {
	for range rounds {
		for _, w := range ways {
			if err := w.measure(ctx, reg, counts, results[w.name]); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
		}
	}
	return nil
}

// measure starts the machines of one way on a fresh node.
func (w way) measure(ctx context.Context, reg *registry, counts []int, f figures) error {
	n, err := newNode(w, reg)
	if err != nil {
		return err
	}
	err = n.measure(ctx, f, counts)
	return errors.Join(err, n.close())
}
