package e2e

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestStart runs a shell from each format in each place: output, exit code,
// standard input, environment, user, a file larger than any window, a write.
func TestStart(t *testing.T) {
	const script = `echo "out $GREETING"; echo err >&2; id -u; id -G; cat; sha256sum </big; touch /new && ls /new; exit 7`
	big := noise(1, 24<<20)
	for _, p := range places {
		for _, f := range formats {
			t.Run(p.name+"/"+f.name, func(t *testing.T) {
				need(t, p.needs...)
				r := newRig(t)
				l := layer(t, f.make, append(busybox(t), registrytest.File("big", 0o644, big))...)
				r.reg.PushImage("start", "v1", registrytest.Image{Layers: []registrytest.Layer{l},
					Config: ocispec.ImageConfig{Entrypoint: []string{"/bin/sh", "-c"}, Env: []string{"GREETING=hello"}, User: "worker"}})
				res := r.run(job{vm: p.vm, source: p.source, image: r.ref("start:v1"), stdin: strings.NewReader("from stdin\n"),
					command: []string{strings.Replace(script, "/new", "/tmp/new", 2)}})
				want := fmt.Sprintf("out hello\n1234\n100 555\nfrom stdin\n%x  -\n/tmp/new\n", sha256.Sum256([]byte(big)))
				if res.code != 7 || res.stdout != want || !strings.Contains(res.stderr, "err\n") {
					t.Fatalf("exit code %d\nstdout %q\n  want %q\nstderr %q\n%s", res.code, res.stdout, want, res.stderr, r.hostLog())
				}
				if res.report.Index != f.index {
					t.Errorf("index %q, want %q", res.report.Index, f.index)
				}
			})
		}
	}
}

// TestLazyFetchesLittle starts from an eStargz image of which the command needs
// a small part.
func TestLazyFetchesLittle(t *testing.T) {
	need(t, places[0].needs...)
	r := newRig(t)
	l := layer(t, formats[2].make, append(busybox(t), registrytest.File("unused", 0o644, noise(2, 32<<20)))...)
	img := r.reg.PushImage("little", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	res := r.must(job{vm: "qemu", image: r.ref("little:v1"), command: []string{"/bin/echo", "hi"}})
	if res.stdout != "hi\n" {
		t.Fatalf("stdout %q", res.stdout)
	}
	if got, all := r.reg.BlobStats(img.Layers[0].Digest).Bytes, int64(len(l.Blob)); got*4 > all {
		t.Errorf("fetched %d of %d bytes to echo a word", got, all)
	}
}

// TestManyFiles looks at every one of 50,000 files in a virtual machine, and
// reads every tenth: each is a request of its own, slow under emulation.
func TestManyFiles(t *testing.T) {
	need(t, places[0].needs...)
	r := newRig(t)
	const n = 50_000
	l := layer(t, formats[0].make, append(busybox(t), manyFiles(n)...)...)
	r.reg.PushImage("many", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	res := r.must(job{vm: "qemu", image: r.ref("many:v1"),
		command: []string{"/bin/sh", "-c", "find /many -type f -size -2 | wc -l; find /many -type f -name '*0' -print0 | xargs -0 cat | sort | sha256sum"}})
	var lines []string
	for i := 0; i < n; i += 10 {
		lines = append(lines, fmt.Sprintf("file %d\n", i))
	}
	sorted := sha256.Sum256([]byte(strings.Join(slices.Sorted(slices.Values(lines)), "")))
	if want := fmt.Sprintf("%d\n%x  -\n", n, sorted); res.stdout != want {
		t.Errorf("stdout %q, want %q", res.stdout, want)
	}
}

// TestSharedLayers starts two images with a common layer, then the first again:
// every blob crosses the network once.
func TestSharedLayers(t *testing.T) {
	need(t, places[1].needs...)
	r := newRig(t)
	base := layer(t, formats[0].make, append(busybox(t), registrytest.File("base", 0o644, noise(3, 4<<20)))...)
	var pushed []registrytest.Pushed
	for i, name := range []string{"one", "two"} {
		top := layer(t, formats[0].make, registrytest.File("name", 0o644, name), registrytest.File("own", 0o644, noise(uint64(10+i), 1<<20)))
		pushed = append(pushed, r.reg.PushImage(name, "v1", registrytest.Image{Layers: []registrytest.Layer{base, top}, Config: shell()}))
	}
	for _, name := range []string{"one", "two", "one"} {
		res := r.must(job{vm: "none", image: r.ref(name + ":v1"), command: []string{"/bin/sh", "-c", "cat /name; sha256sum </base; sha256sum </own >/dev/null"}})
		if want := fmt.Sprintf("%s%x  -\n", name, sha256.Sum256([]byte(noise(3, 4<<20)))); res.stdout != want {
			t.Errorf("%s: stdout %q, want %q", name, res.stdout, want)
		}
	}
	for _, p := range pushed {
		for _, d := range p.Layers {
			if got := r.reg.BlobStats(d.Digest).Bytes; got != d.Size {
				t.Errorf("layer %s: %d bytes fetched of %d", d.Digest, got, d.Size)
			}
		}
	}
}

// TestTwoMachines runs one image in two virtual machines at a time: the
// registry sends every byte once.
func TestTwoMachines(t *testing.T) {
	need(t, places[0].needs...)
	r := newRig(t)
	data := noise(4, 8<<20)
	l := layer(t, formats[0].make, append(busybox(t), registrytest.File("data", 0o644, data))...)
	img := r.reg.PushImage("twice", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	var both sync.WaitGroup
	results := make([]result, 2)
	for i := range results {
		both.Go(func() {
			results[i] = r.run(job{vm: "qemu", image: r.ref("twice:v1"), command: []string{"/bin/sha256sum", "/data"}})
		})
	}
	both.Wait()
	want := fmt.Sprintf("%x  /data\n", sha256.Sum256([]byte(data)))
	for i, res := range results {
		if res.code != 0 || res.stdout != want {
			t.Errorf("machine %d: exit code %d, stdout %q, want %q\n%s", i, res.code, res.stdout, want, res.stderr)
		}
	}
	if got := r.reg.BlobStats(img.Layers[0].Digest).Bytes; got != int64(len(l.Blob)) {
		t.Errorf("%d bytes came from the registry, the blob has %d", got, len(l.Blob))
	}
}

// TestStalledRegistry reads on from a registry that pauses for ten seconds in
// the middle of the start.
func TestStalledRegistry(t *testing.T) {
	need(t, places[0].needs...)
	r := newRig(t)
	data := noise(5, 8<<20)
	l := layer(t, formats[2].make, append(busybox(t), registrytest.File("data", 0o644, data))...)
	r.reg.PushImage("stall", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	// The first range requests are the table of contents; stall what follows.
	r.reg.FaultFunc(stallAfter(4), 3, registrytest.Stall(1000, 10*time.Second))
	res := r.must(job{vm: "qemu", image: r.ref("stall:v1"), command: []string{"/bin/sha256sum", "/data"}})
	if want := fmt.Sprintf("%x  /data\n", sha256.Sum256([]byte(data))); res.stdout != want {
		t.Errorf("stdout %q, want %q", res.stdout, want)
	}
}

// stallAfter matches blob requests but for the first n.
func stallAfter(n int) func(*http.Request) bool {
	return func(r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		n--
		return n < 0
	}
}
