// Command nydus-overlayfs-tatami mounts images of mode "guest" on the host when
// containerd asks for it. Kata's Go runtime knows such mounts by the beginning
// of the program's name. See host/mounthelper.
package main

import (
	"fmt"
	"os"

	"github.com/tatami-containers/tatami/host/mounthelper"
)

func main() {
	if err := mounthelper.Main(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "nydus-overlayfs-tatami:", err)
		os.Exit(1)
	}
}
