// Command tatami-guest mounts container images inside a virtual machine.
package main

import (
	"os"

	"github.com/tatami-containers/tatami/guest/daemon"
)

func main() {
	os.Exit(daemon.Main(os.Args[1:], os.Stderr))
}
