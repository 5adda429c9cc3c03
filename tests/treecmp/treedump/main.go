// Command treedump writes a directory tree as a gob of treecmp.Tree, so that a
// tree inside a virtual machine can be compared with one outside.
//
//	treedump DIR [SKIP…]
//
// The SKIPs are paths below DIR that are left out with all below them.
package main

import (
	"encoding/gob"
	"log"
	"os"

	"github.com/tatami-containers/tatami/tests/treecmp"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("usage: treedump DIR [SKIP…]")
	}
	tree, err := treecmp.Snapshot(os.Args[1], os.Args[2:]...)
	if err != nil {
		log.Fatal(err)
	}
	if err := gob.NewEncoder(os.Stdout).Encode(tree); err != nil {
		log.Fatal(err)
	}
}
