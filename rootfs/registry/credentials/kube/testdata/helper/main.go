// Command helper answers as a docker-credential-* program does when its first
// argument is "get", and otherwise as a credential provider of the kubelet.
// The directory in HELPER_DIR says what it answers: "answer" and "exit" are
// files; each run adds its arguments and its input to "runs".
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	dir := os.Getenv("HELPER_DIR")
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		fail(err)
	}
	runs, err := os.OpenFile(filepath.Join(dir, "runs"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		fail(err)
	}
	fmt.Fprintf(runs, "%s %s < %s\n", os.Getenv("HELPER_NAME"), strings.Join(os.Args[1:], " "), input)
	if err := runs.Close(); err != nil {
		fail(err)
	}
	if wait, err := os.ReadFile(filepath.Join(dir, "wait")); err == nil {
		d, err := time.ParseDuration(string(wait))
		if err != nil {
			fail(err)
		}
		time.Sleep(d)
	}
	answer, err := os.ReadFile(filepath.Join(dir, "answer"))
	if err != nil {
		fail(err)
	}
	os.Stdout.Write(answer)
	os.Stderr.Write(answer) // for the test of what becomes of it
	if _, err := os.Stat(filepath.Join(dir, "exit")); err == nil {
		os.Exit(1)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(2)
}
