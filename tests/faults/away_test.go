package faults

import (
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// listenOn listens on an address, which another test may have for a moment.
func listenOn(t *testing.T, address string) net.Listener {
	t.Helper()
	var l net.Listener
	eventually(t, "listen on "+address, func() (ok bool) {
		var err error
		l, err = new(net.ListenConfig).Listen(t.Context(), "tcp", address)
		return err == nil
	})
	return l
}

// TestMoves lets a registry vanish while its images are read, and come back: first
// where it was, then where its name says that it is now.
func TestMoves(t *testing.T) {
	t.Parallel()
	need(t)
	for _, kind := range []string{"relay", "direct"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			l := listenOn(t, "127.0.0.2:0")
			_, port, err := net.SplitHostPort(l.Addr().String())
			check(t, err)
			hosts, host := hostsFile(t, "127.0.0.2"), net.JoinHostPort(server, port)
			addresses := []string{"127.0.0.2", "127.0.0.3"}
			images := []image{newImage(), newImage()} // one for each
			serve := func(l net.Listener) *registrytest.Server {
				reg := registrytest.Start(t, registrytest.Options{Listener: l})
				for n, i := range images {
					reg.PushImage(fmt.Sprintf("moves%d", n), "v1", registrytest.Image{Layers: []registrytest.Layer{i.layer}})
				}
				return reg
			}
			reg := serve(l)
			var g *guest
			if kind == "relay" {
				g = startHost(t, relayed("[registry]", fmt.Sprintf("plain_http = [%q]", host)), privately(hosts)...).attached(t)
			} else {
				g = direct(t, nil, privately(hosts), "--plain-http", host).outside()
			}
			for n, address := range addresses {
				i, root := images[n], g.mustPull(t, fmt.Sprintf("c%d", n), fmt.Sprintf("%s/moves%d:v1", host, n))
				check(t, i.read(t, root, 0, 1))
				reg.Close()
				read := make(chan error, 1)
				go func() { read <- i.read(t, root, 1, files) }()
				check(t, os.WriteFile(hosts, fmt.Appendf(nil, "%s %s\n", address, server), 0o644))
				reg = serve(listenOn(t, net.JoinHostPort(address, port)))
				if err := <-read; err != nil {
					t.Errorf("after the registry has come back at %s: %v", address, err)
				}
				if len(reg.Requests("/blobs/")) == 0 {
					t.Errorf("nothing was asked of the registry at %s", address)
				}
			}
		})
	}
}
