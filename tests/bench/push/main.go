// Command push copies the image of an OCI layout, as it is, to a registry
// without TLS:
//
//	push LAYOUT HOST:PORT/NAME TAG
package main

import (
	"context"
	"log"
	"os"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: push LAYOUT HOST:PORT/NAME TAG")
	}
	if err := ocilayout.Dir(os.Args[1]).Push(context.Background(), os.Args[2], os.Args[3]); err != nil {
		log.Fatal("push: ", err)
	}
}
