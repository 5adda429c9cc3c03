// Command fetch-kernel puts a kernel for test guests into the cache, by apt.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/tatami-containers/tatami/tools/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	k, err := vm.FetchKernel(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "fetch-kernel:", err)
		os.Exit(1)
	}
	fmt.Println(k.Image)
}
