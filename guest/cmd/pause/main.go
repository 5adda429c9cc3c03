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

// catch returns the signals to end, and a channel of its own, so that they crowd
// out none, for those of children.
func catch() (ends, children <-chan os.Signal) {
	end, child := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(child, syscall.SIGCHLD)
	return end, child
}

// serve returns when it is asked to end.
func serve(ends, children <-chan os.Signal) {
	reap() // what ended before signals were caught
	for {
		select {
		case <-ends:
			return
		case <-children:
			reap()
		}
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
