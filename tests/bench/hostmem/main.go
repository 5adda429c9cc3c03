// Command hostmem tells the memory of tatami-host:
//
//	hostmem TATAMI-HOST FILES
//
// It has the program prepare an image with that many files from a registry and
// prints its resident memory before, at the peak and afterwards.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: hostmem TATAMI-HOST FILES")
	}
	n, err := strconv.Atoi(os.Args[2])
	if err == nil {
		err = measure(context.Background(), os.Args[1], n)
	}
	if err != nil {
		log.Fatal("hostmem: ", err)
	}
}

func measure(ctx context.Context, program string, files int) error {
	dir, err := os.MkdirTemp("", "tatami-hostmem-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	reg := registrytest.New(registrytest.Options{})
	defer reg.Close()
	reg.PushImage("files", "v1", image(files))

	cmd := exec.CommandContext(ctx, program, "--root", dir)
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }() // it has nothing to lose
	conn, err := dial(ctx, filepath.Join(dir, "tatami-host.sock"))
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	idle := memory(cmd.Process.Pid, "VmRSS")
	start := time.Now()
	if _, err := api.NewNodeClient(client).Prepare(ctx, &api.PrepareRequest{Reference: reg.Host() + "/files:v1"}); err != nil {
		return err
	}
	fmt.Printf("tatami-host, an image of %d files: prepared in %.2f s; resident %d MiB idle, %d MiB at the peak, %d MiB afterwards\n",
		files, time.Since(start).Seconds(), idle, memory(cmd.Process.Pid, "VmHWM"), memory(cmd.Process.Pid, "VmRSS"))
	return nil
}

func image(files int) registrytest.Image {
	var entries []registrytest.Entry
	for i := range files {
		if i%500 == 0 {
			entries = append(entries, registrytest.Dir(fmt.Sprintf("usr/share/some/where/%d", i/500), 0o755))
		}
		entries = append(entries, registrytest.File(fmt.Sprintf("usr/share/some/where/%d/file-%d.txt", i/500, i), 0o644, strings.Repeat(strconv.Itoa(i), 50)))
	}
	return registrytest.Image{Layers: []registrytest.Layer{registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(entries...))))}}
}

func dial(ctx context.Context, socket string) (net.Conn, error) {
	for range 500 {
		var d net.Dialer
		if c, err := d.DialContext(ctx, "unix", socket); err == nil {
			return c, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("nobody listens on %s", socket)
}

// memory reads a line of /proc/PID/status, in MiB.
func memory(pid int, key string) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		log.Fatal("hostmem: ", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kb, _ := strconv.Atoi(strings.Fields(rest)[0]) // the kernel prints a number
			return kb >> 10
		}
	}
	return 0
}
