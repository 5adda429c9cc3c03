// Command fsbench compares file systems that hold the same tree:
//
//	fsbench [-rounds N] [-markdown] NAME=DIR…
//
// It walks, stats and reads each tree, interleaved over the rounds, cold (page
// cache dropped) and warm, and prints the medians in seconds and as a ratio to
// the first tree. Reads of 4 KiB go past the page cache, where the file system
// knows how. It wants root, to drop the caches.
package main

import (
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

const (
	smallFiles = 2000     // files of the small-file reading
	smallMax   = 64 << 10 // bytes, the largest of them
	seqBytes   = 400 << 20
)

// tree is one file system under test and what was measured of it.
type tree struct {
	name, dir string
	seconds   map[string][]float64
}

// plan is what every tree is asked to do: the same files in the same order.
type plan struct {
	small, large []string
	requests     int // of 4 KiB
}

func main() {
	log.SetFlags(0)
	rounds := flag.Int("rounds", 5, "how often each figure is taken")
	requests := flag.Int("requests", 4096, "how many reads of 4 KiB a figure has, of all its readers together")
	markdown := flag.Bool("markdown", false, "print a table of Markdown, a line for each figure")
	flag.Parse()
	var trees []*tree
	for _, a := range flag.Args() {
		name, dir, ok := strings.Cut(a, "=")
		if !ok {
			log.Fatalf("fsbench: %q is not NAME=DIR", a)
		}
		trees = append(trees, &tree{name, dir, map[string][]float64{}})
	}
	if len(trees) == 0 {
		log.Fatal("usage: fsbench [-rounds N] NAME=DIR…")
	}
	p, err := makePlan(trees[0].dir)
	if err != nil {
		log.Fatal(err)
	}
	p.requests = *requests
	for range *rounds {
		for _, t := range trees {
			if err := t.measure(p); err != nil {
				log.Fatalf("fsbench: %s: %v", t.name, err)
			}
		}
	}
	write := print
	if *markdown {
		write = printMarkdown
	}
	if err := write(os.Stdout, trees); err != nil {
		log.Fatal(err)
	}
}

// makePlan picks every k-th small file, and large ones up to seqBytes.
func makePlan(root string) (*plan, error) {
	var p plan
	var all []string
	var total int64
	err := walk(root, func(path string, d fs.DirEntry) error {
		if !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch size := info.Size(); {
		case size > 0 && size <= smallMax:
			all = append(all, rel)
		case size > 1<<20 && total < seqBytes:
			p.large = append(p.large, rel)
			total += size
		}
		return nil
	})
	step := max(1, len(all)/smallFiles)
	for i := 0; i < len(all) && len(p.small) < smallFiles; i += step {
		p.small = append(p.small, all[i])
	}
	return &p, err
}

// walk visits one file system, without what is mounted below it.
func walk(root string, f func(string, fs.DirEntry) error) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if rel, _ := filepath.Rel(root, path); rel == "proc" || rel == "sys" || rel == "dev" {
			return fs.SkipDir
		}
		return f(path, d)
	})
}

// figure is one measurement of a tree.
type figure struct {
	name string
	cold bool
	do   func(*tree, *plan) error
}

var figures = []figure{
	{"find, cold", true, func(t *tree, _ *plan) error { return walk(t.dir, func(string, fs.DirEntry) error { return nil }) }},
	{"stat all, cold", true, (*tree).statAll},
	{"stat all, warm", false, (*tree).statAll},
	{"small files, cold", true, (*tree).readSmall},
	{"small files, warm", false, (*tree).readSmall},
	{"sequential, cold", true, (*tree).readLarge},
	{"sequential, warm", false, (*tree).readLarge},
	{"4 KiB in order", true, (*tree).inOrder},
	{"4 KiB at random", true, func(t *tree, p *plan) error { return t.atRandom(p, 1) }},
	{"the same, 8 readers", true, func(t *tree, p *plan) error { return t.atRandom(p, 8) }},
}

func (t *tree) measure(p *plan) error {
	for _, f := range figures {
		if f.cold {
			if err := dropCaches(); err != nil {
				return err
			}
		}
		start := time.Now()
		if err := f.do(t, p); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		t.seconds[f.name] = append(t.seconds[f.name], time.Since(start).Seconds())
	}
	return nil
}

func (t *tree) readSmall(p *plan) error { return readAll(t.dir, p.small) }

func (t *tree) readLarge(p *plan) error { return readAll(t.dir, p.large) }

func (t *tree) statAll(*plan) error {
	return walk(t.dir, func(path string, _ fs.DirEntry) error {
		_, err := os.Lstat(path)
		return err
	})
}

func readAll(root string, files []string) error {
	buf := make([]byte, 1<<20)
	for _, name := range files {
		f, err := os.Open(filepath.Join(root, name))
		if err != nil {
			return err
		}
		for err == nil {
			_, err = f.Read(buf)
		}
		f.Close()
		if err != io.EOF { //nolint:errorlint // os.File returns it as it is
			return err
		}
	}
	return nil
}

func dropCaches() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache (as root): %w", err)
	}
	return nil
}

func print(w io.Writer, trees []*tree) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "seconds (ratio to %s)", trees[0].name)
	for _, f := range figures {
		fmt.Fprintf(tw, "\t%s", f.name)
	}
	fmt.Fprintln(tw)
	for _, t := range trees {
		fmt.Fprint(tw, t.name)
		for _, f := range figures {
			m := median(t.seconds[f.name])
			fmt.Fprintf(tw, "\t%.3f (%.2f)", m, m/median(trees[0].seconds[f.name]))
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}

func printMarkdown(w io.Writer, trees []*tree) error {
	var b strings.Builder
	fmt.Fprintf(&b, "| | %s, seconds |", trees[0].name)
	for _, t := range trees[1:] {
		fmt.Fprintf(&b, " %s |", t.name)
	}
	fmt.Fprintf(&b, "\n|%s\n", strings.Repeat("---|", len(trees)+1))
	for _, f := range figures {
		first := median(trees[0].seconds[f.name])
		fmt.Fprintf(&b, "| %s | %.3f |", f.name, first)
		for _, t := range trees[1:] {
			fmt.Fprintf(&b, " %.2f× |", median(t.seconds[f.name])/first)
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}
