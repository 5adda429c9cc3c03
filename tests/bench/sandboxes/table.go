package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// figures are the values of the rows: seconds, or MiB of memory.
type figures map[string][]float64

func (f figures) note(row string, v float64) { f[row] = append(f[row], v) }

func (f figures) median(row string) float64 {
	s := slices.Sorted(slices.Values(f[row]))
	return s[len(s)/2]
}

// first names the row of what happens in the first machine, or in a later one.
func first(what string, machine int) string {
	if machine == 0 {
		return what + ", first machine"
	}
	return what + ", another"
}

func machinesRow(n int) string { return fmt.Sprintf("host memory, machines started: %d", n) }

const (
	eachRow = "host memory, each further one"
	readRow = "host memory, everything read in all of them"
	addsRow = "host memory that reading adds"
)

// rows in the order of the table.
func rows(counts []int) []string {
	list := []string{first("first output", 0), first("first output", 1), first("reading everything", 0),
		first("reading everything", 1), "reading it again"}
	for _, n := range counts {
		list = append(list, machinesRow(n))
	}
	return append(list, eachRow, readRow, first(addsRow, 0), first(addsRow, 1))
}

// finish adds what follows from the figures.
func (f figures) finish(counts []int) {
	few, many := counts[0], counts[len(counts)-1]
	for i, all := range f[machinesRow(many)] {
		if many > few {
			f.note(eachRow, (all-f[machinesRow(few)][i])/float64(many-few))
		}
	}
}

// write prints Markdown: medians in seconds and MiB, and how they compare with those of
// the last way.
func write(w io.Writer, results map[string]figures, counts []int) {
	fmt.Fprint(w, "| |")
	for _, way := range ways {
		results[way.name].finish(counts)
		fmt.Fprintf(w, " %s |", way.name)
	}
	fmt.Fprintf(w, "\n|%s\n", strings.Repeat("---|", len(ways)+1))
	last := results[ways[len(ways)-1].name]
	for _, row := range rows(counts) {
		if len(last[row]) == 0 { // with one machine there is no other
			continue
		}
		fmt.Fprintf(w, "| %s |", row)
		for _, way := range ways {
			fmt.Fprint(w, cell(row, results[way.name].median(row), last.median(row)))
		}
		fmt.Fprintln(w)
	}
}

// cell is a value, and how it compares where the last way has such a thing at all: it
// has read everything when it starts.
func cell(row string, v, last float64) string {
	format := "%.2f"
	if v >= 10 {
		format = "%.0f"
	}
	if strings.HasPrefix(row, addsRow) {
		return fmt.Sprintf(" "+format+" |", v)
	}
	return fmt.Sprintf(" "+format+" (%.2f×) |", v, v/last)
}
