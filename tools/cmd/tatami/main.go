// Command tatami runs containers from images that are not there yet, and
// measures how that goes.
package main

import (
	"context"
	"os"

	"github.com/tatami-containers/tatami/tools/cli"
)

func main() {
	os.Exit(cli.Main(context.Background(), os.Args[1:], cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
}
