package virtiofsvm

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/tests/vmtest"
)

// BenchmarkDevices has one guest read one tree over and over: from an image file that
// mkfs.erofs has made, by this device with one queue and with more (of which Linux 6.1
// uses one), by the virtiofsd that Kata ships and by QEMU's, and from the node's store
// by this device and by the relay over vsock. It prints medians in seconds and ratios to
// the first (program fsbench) of TATAMI_BENCH_ROUNDS rounds (3). A device that is not on
// this machine is left out.
func BenchmarkDevices(b *testing.B) {
	vmtest.Need(b)
	rounds, err := strconv.Atoi(cmp.Or(os.Getenv("TATAMI_BENCH_ROUNDS"), "3"))
	if err != nil {
		b.Fatal(err)
	}
	c := newComparison(b)
	var trees []string
	c.host.grant(c.g, sandbox)
	for _, d := range c.served {
		dir := "/m/" + d.tag
		c.g.sh(fmt.Sprintf("mkdir -p /fs/%[1]s %[2]s && mount -t virtiofs %[1]s /fs/%[1]s && mount -t erofs -o ro $("+losetup+
			" --find --show --read-only --direct-io=on /fs/%[1]s/%[3]s) %[2]s", d.tag, dir, d.file))
		trees = append(trees, d.name+"="+dir)
	}
	c.host.relay(c.g, sandbox, "/m/relay")
	trees = append(trees, "relay, store=/m/relay")
	for b.Loop() {
		table := c.g.try(fmt.Sprintf("/opt/fsbench -markdown -rounds %d -requests 512 '%s' 2>&1", rounds, strings.Join(trees, "' '")))
		if !strings.HasPrefix(table, "|") {
			b.Fatal(table)
		}
		fmt.Printf("\n%s\n", table)
	}
}

// comparison is a guest with the devices.
type comparison struct {
	g      *guest
	base   string
	host   *host
	args   []string // for QEMU
	served []served
}

// served is one device with its name for people, and the file to mount.
type served struct{ tag, name, file string }

const sandbox = "bench" // as the node calls the guest

func newComparison(b *testing.B) *comparison {
	base, err := os.MkdirTemp("", "fs-") //nolint:usetesting // sockets are below it: the path must be short
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(base) })
	dir, tree, bin := filepath.Join(base, "images"), filepath.Join(base, "tree"), filepath.Join(base, "bin")
	build(b, bin, "./tests/bench/fsbench", "./host/cmd/tatami-host", "./guest/cmd/tatami-guest")
	measured(b, tree)
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	run(b, "", "mkfs.erofs", "--quiet", filepath.Join(dir, "image"), tree)
	c := &comparison{base: base, host: newHost(b, bin, base, tree)}
	for _, queues := range []int{1, 2, 4} {
		name := "tatami"
		if queues > 1 {
			name = fmt.Sprintf("%d queues", queues)
		}
		serve(b, nil, "--socket-path", c.add("q"+strconv.Itoa(queues), name, "image", queues), "--shared-dir", dir)
	}
	for _, o := range others {
		if o.find() == "" {
			b.Logf("left out: %s", o.missing)
			continue
		}
		o.serve(b, c.add(o.name, "virtiofsd ("+o.name+")", "image", 1), dir)
	}
	c.host.serve(sandbox, c.add("store", "tatami, store", sharedimages.Name(c.host.image), 1))
	c.g = start(b, vmtest.Options{CPUs: 2, Args: c.args, Files: programs(b, bin, "fsbench", "tatami-guest")})
	c.g.sh("chmod 755 /opt/*")
	return c
}

// add gives the guest one more device, and returns its socket.
func (c *comparison) add(tag, name, file string, queues int) (socket string) {
	socket = filepath.Join(c.base, tag)
	c.args = slices.Concat(c.args, device(tag, socket, queues))
	c.served = append(c.served, served{tag, name, file})
	return socket
}

// programs are for a guest's /opt.
func programs(t testing.TB, dir string, names ...string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files["/opt/"+name] = data
	}
	return files
}

// measured makes the tree: what an image has many of, and one large file.
func measured(b *testing.B, tree string) {
	const files, large = 500, 32 << 20
	src := rand.NewChaCha8([32]byte{1})
	rnd := rand.New(src)
	write := func(name string, n int) {
		data := make([]byte, n)
		_, _ = src.Read(data) // never fails
		path := filepath.Join(tree, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err == nil {
			err = os.WriteFile(path, data, 0o644)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	for i := range files {
		write(fmt.Sprintf("d%02d/f%03d", i%20, i), 1+rnd.IntN(16<<10))
	}
	write("large", large)
}
