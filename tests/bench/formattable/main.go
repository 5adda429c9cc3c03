// Command formattable prints what starts of one image in several formats took,
// against a full pull of the same image with gzip layers in the same rounds:
//
//	formattable DIR FORMAT…
//
// DIR has the reports of `tatami bench start --format json` as
// PROGRAM.FORMAT.ROUND.json, PROGRAM being line, import and all.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"slices"

	"github.com/tatami-containers/tatami/tools/bench"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/run"
)

// programs are what the containers ran.
var programs = []string{"line", "import", "all"}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: formattable DIR FORMAT…")
	}
	dir := os.Args[1]
	full := map[string]runs{}
	for _, p := range programs {
		full[p] = read(dir, p, "gzip")[bench.FullPull]
		if len(full[p]) == 0 {
			log.Fatalf("formattable: no full pull of %s in %s", p, dir)
		}
	}
	fmt.Println("| format | image | before the mount | mounted | prints a line, cold / warm | imports torch | reads every file |")
	fmt.Println("|---|---|---|---|---|---|---|")
	for _, format := range os.Args[2:] {
		fmt.Println(row(dir, format, full))
	}
}

// runs of one program in one way.
type runs []*run.Report

func read(dir, program, format string) map[string]runs {
	all := map[string]runs{}
	files, err := filepath.Glob(filepath.Join(dir, program+"."+format+".*.json"))
	if err != nil {
		log.Fatal("formattable: ", err)
	}
	for _, f := range files {
		var c bench.Comparison
		b, err := os.ReadFile(f)
		if err == nil {
			err = json.Unmarshal(b, &c)
		}
		if err != nil {
			continue // the format could not be started; its cell stays empty
		}
		for way, rs := range c.Reports {
			all[way] = append(all[way], rs...)
		}
	}
	return all
}

func row(dir, format string, full map[string]runs) string {
	line := read(dir, "line", format)
	cold := line[bench.Cold]
	if len(cold) == 0 {
		return fmt.Sprintf("| %s | - | - | - | - | - | - |", format)
	}
	size := cold[0].CompressedSize
	s := fmt.Sprintf("| %s | %s | %s | %.1f× |", format, progress.Bytes(size),
		progress.Bytes(int64(cold.median(func(r *run.Report) float64 { return float64(r.FetchedAtMount) }))),
		full["line"].median(mounted)/cold.median(mounted))
	for _, p := range programs {
		ways := read(dir, p, format)
		s += fmt.Sprintf(" %s / %s |", faster(full[p], ways[bench.Cold]), faster(full[p], ways[bench.Warm]))
	}
	return s
}

func mounted(r *run.Report) float64 { return r.Mounted }
func done(r *run.Report) float64    { return r.Done }

func (rs runs) median(f func(*run.Report) float64) float64 {
	var v []float64
	for _, r := range rs {
		v = append(v, f(r))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func faster(full, rs runs) string {
	if len(rs) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f×", full.median(done)/rs.median(done))
}
