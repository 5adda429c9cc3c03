// Command fsbench compares file systems that hold the same tree:
//
//	fsbench [-rounds N] NAME=DIR…
//
// It walks, stats and reads each tree, interleaved over the rounds, cold (page
// cache dropped) and warm, and prints the medians in seconds and as a ratio to
// the first tree. It wants root, to drop the caches.
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
}

func main() {
	log.SetFlags(0)
	rounds := flag.Int("rounds", 5, "how often each figure is taken")
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
	for range *rounds {
		for _, t := range trees {
			if err := t.measure(p); err != nil {
				log.Fatalf("fsbench: %s: %v", t.name, err)
			}
		}
	}
	if err := print(os.Stdout, trees); err != nil {
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

func (t *tree) measure(p *plan) error {
	read := func(files []string) func() error { return func() error { return readAll(t.dir, files) } }
	for _, m := range []struct {
		name string
		cold bool
		do   func() error
	}{
		{"find, cold", true, func() error { return walk(t.dir, func(string, fs.DirEntry) error { return nil }) }},
		{"stat all, cold", true, t.statAll},
		{"stat all, warm", false, t.statAll},
		{"small files, cold", true, read(p.small)},
		{"small files, warm", false, read(p.small)},
		{"sequential, cold", true, read(p.large)},
		{"sequential, warm", false, read(p.large)},
	} {
		if m.cold {
			if err := dropCaches(); err != nil {
				return err
			}
		}
		start := time.Now()
		if err := m.do(); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		t.seconds[m.name] = append(t.seconds[m.name], time.Since(start).Seconds())
	}
	return nil
}

func (t *tree) statAll() error {
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
	names := []string{"find, cold", "stat all, cold", "stat all, warm", "small files, cold", "small files, warm", "sequential, cold", "sequential, warm"}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "seconds (ratio to %s)\t%s\n", trees[0].name, strings.Join(names, "\t"))
	for _, t := range trees {
		fmt.Fprint(tw, t.name)
		for _, n := range names {
			m := median(t.seconds[n])
			fmt.Fprintf(tw, "\t%.3f (%.2f)", m, m/median(trees[0].seconds[n]))
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}
