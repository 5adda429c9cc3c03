// Command fleet prints what package tests/fleet computes, in Markdown, and draws its
// charts:
//
//	fleet [-out DIR]
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/tatami-containers/tatami/tests/chart"
	"github.com/tatami-containers/tatami/tests/fleet"
)

func main() {
	log.SetFlags(0)
	out := flag.String("out", "", "directory for the charts (SVG); none when empty")
	flag.Parse()
	table(os.Stdout)
	if *out == "" {
		return
	}
	for name, c := range map[string]chart.Chart{"published.svg": fleet.Published(), "times.svg": fleet.Times(), "bytes.svg": fleet.Bytes()} {
		if err := c.WriteFile(filepath.Join(*out, name)); err != nil {
			log.Fatal("fleet: ", err)
		}
	}
	log.Printf("charts are in %s", *out)
}

// table has a row for each way and size of a fleet.
func table(w io.Writer) {
	fmt.Fprint(w, "| | nodes | half of them take | the last is ready after | registry sends | at its limit for |\n|---|---|---|---|---|---|\n")
	for _, way := range fleet.Ways() {
		for _, n := range fleet.Sizes {
			r := way.Run(n)
			fmt.Fprintf(w, "| %s | %d | %.0f s | %.0f s | %.4g GB | %.0f s |\n", way.Name, n, r.Median(), r.All(), r.Sent/1e9, r.Busy)
		}
	}
}
