package isolation

import (
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/link"
)

// sendBuffer is what the kernel keeps of each connection of the registry: so little that
// what the registry has sent is what went over the link, within a tenth of a second.
const sendBuffer = 64 << 10

// site is a registry behind a link.
type site struct {
	*registrytest.Server
	*network
	repos map[string][]registrytest.Pushed
}

// newSite returns a registry whose answers come after the shape's round-trip time, at
// its rate when the link is limited.
func newSite(tb testing.TB, shape link.Shape) *site {
	tb.Helper()
	n := newNetwork(tb, shape)
	s := &site{Server: registrytest.New(registrytest.Options{Listener: narrow{n.listener}}), network: n, repos: map[string][]registrytest.Pushed{}}
	tb.Cleanup(s.Close)
	if n.rtt() > 0 {
		s.Fault("", 0, registrytest.Delay(n.rtt()))
	}
	return s
}

// narrow accepts connections with a small send buffer.
type narrow struct{ net.Listener }

func (n narrow) Accept() (net.Conn, error) {
	c, err := n.Listener.Accept()
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(sendBuffer) // it measures less exactly then
	}
	return c, err
}

// ref names an image of the site.
func (s *site) ref(name string) string { return s.address + "/" + name + ":v1" }

// push adds an image to the registry.
func (s *site) push(name string, layers ...registrytest.Layer) {
	s.repos[name] = append(s.repos[name], s.PushImage(name, "v1", registrytest.Image{Layers: layers}))
}

// sent is how many bytes of layers of the images with these names went out.
func (s *site) sent(names ...string) (bytes int64, requests int) {
	for _, name := range names {
		for _, p := range s.repos[name] {
			for _, l := range p.Layers {
				c := s.BlobStats(l.Digest)
				bytes, requests = bytes+c.Bytes, requests+c.Requests
			}
		}
	}
	return bytes, requests
}

// size is that of the layers of an image.
func (s *site) size(name string) (n int64) {
	for _, p := range s.repos[name] {
		for _, l := range p.Layers {
			n += l.Size
		}
	}
	return n
}

// sample is what had been sent of the images of two names at a time.
type sample struct {
	at            time.Time
	online, batch int64
}

// watch samples what is sent of images every tenth of a second until stop is called.
func (s *site) watch(online, batch []string) (stop func() []sample) {
	var all []sample
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			now := sample{at: time.Now()}
			now.online, _ = s.sent(online...)
			now.batch, _ = s.sent(batch...)
			all = append(all, now)
			select {
			case <-tick.C:
			case <-end:
				return
			}
		}
	}()
	return func() []sample { close(end); <-ended; return all }
}

// blobs matches requests for layers of an image.
func blobs(name string) func(*http.Request) bool {
	return func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/"+name+"/blobs/") }
}
