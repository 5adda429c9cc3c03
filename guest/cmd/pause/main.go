// Command pause is the process of a sandbox's own container: it holds the
// namespaces that the containers of a pod share, takes in processes that have
// lost their parent, and ends when it is asked to.
package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"
)

func main() { serve(catch()) }

func catch() <-chan os.Signal {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	return signals
}

// serve returns when it is asked to end.
func serve(signals <-chan os.Signal) {
	reap() // what ended before signals were caught
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		reap()
	}
}

// reap waits for all children that have ended: several may share one signal.
func reap() {
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if pid <= 0 && !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}
