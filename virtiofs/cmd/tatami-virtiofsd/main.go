// Command tatami-virtiofsd shows a virtual machine the image files of a directory
// over virtio-fs, as the virtio_fs_daemon of Kata Containers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/tatami-containers/tatami/virtiofs/virtiofsd"
)

func main() {
	log.SetOutput(io.Discard) // go-fuse's word about what guests send
	if virtiofsd.IsChild(os.Args) {
		exit(virtiofsd.RunChild(os.Stderr))
	}
	o, err := virtiofsd.Parse(os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tatami-virtiofsd:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	err = virtiofsd.Run(ctx, o, os.Stderr)
	stop()
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "tatami-virtiofsd:", err)
		os.Exit(1)
	}
	os.Exit(0)
}
