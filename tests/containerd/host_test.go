package containerd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// hostRoot is the root of the node's tatami-host, on disk.
func (n *node) hostRoot() string { return filepath.Join(n.dir, "tatami") }

// hostState is its state, on the node's own /run.
const hostState = "/run/tatami-host"

// share and guest are snapshotters of tatami-host.
const (
	share = "[[snapshotter]]\nname = \"tatami\"\nmode = \"share\"\nfallback = [\"full\"]\n"
	guest = "[[snapshotter]]\nname = \"guest\"\nmode = \"guest\"\nfallback = [\"share\", \"full\"]\n"
)

// host starts tatami-host with snapshotters and waits until it is ready.
func (n *node) host(t *testing.T, snapshotters string) *daemon {
	t.Helper()
	need(t, "mount.fuse")
	settings := fmt.Sprintf("version = 1\nroot = %q\nstate = %q\n%s", n.hostRoot(), hostState, snapshotters)
	if err := os.WriteFile(n.settings(), []byte(settings), 0o644); err != nil {
		t.Fatal(err)
	}
	n.manager = startManager(t, n.dir)
	n.run(t, "sh", "-c", `mkdir -p /opt/tatami && ln -s "$0" /opt/tatami/bin`, bin)
	return n.restartHost(t)
}

func (n *node) settings() string { return filepath.Join(n.dir, "host.toml") }

// restartHost starts tatami-host with the settings that it had and the
// descriptors that it stored.
func (n *node) restartHost(t *testing.T) *daemon {
	t.Helper()
	env, files := n.manager.given()
	d := n.start(t, "tatami-host", env, files, "/opt/tatami/bin/tatami-host", "--config", n.settings())
	until(t, func() error {
		if err := d.alive(); err != nil {
			t.Fatal(err)
		}
		if !n.manager.isReady() {
			return fmt.Errorf("%s has not said that it is ready", d.name)
		}
		return nil
	})
	return d
}

// proxyOf is the proxy plugin of a snapshotter of tatami-host.
func (n *node) proxyOf(name string) proxy {
	return proxy{name, hostState + "/" + name + ".sock", n.hostRoot() + "/snapshotter/" + name}
}

// hostLog is what tatami-host has logged.
func (n *node) hostLog(t *testing.T) string {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(n.dir, "tatami-host.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(log)
}

// status is what `tatami status` says.
func (n *node) status(t *testing.T) string {
	t.Helper()
	return n.run(t, "/opt/tatami/bin/tatami", "status", "--socket", filepath.Join(n.hostRoot(), "tatami-host.sock"))
}

// usage is how many bytes the files below a directory take on disk. Files may
// vanish meanwhile.
func (n *node) usage(t *testing.T, dir string) int64 {
	t.Helper()
	out := n.run(t, "sh", "-c", `du -s --block-size=1 "$0" 2>/dev/null || :`, dir)
	var bytes int64
	if _, err := fmt.Sscan(out, &bytes); err != nil {
		t.Fatalf("du %s: %q: %v", dir, out, err)
	}
	return bytes
}

// snapshotKeys lists the snapshots that containerd has with a snapshotter.
func (n *node) snapshotKeys(t *testing.T, namespace, snapshotter string) (keys []string) {
	t.Helper()
	out := n.ctr(t, "--namespace", namespace, "snapshot", "--snapshotter", snapshotter, "ls")
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 0 && f[0] != "KEY" {
			keys = append(keys, f[0])
		}
	}
	return keys
}

// hasContent says whether containerd itself has a blob.
func (n *node) hasContent(t *testing.T, namespace string, b blob) bool {
	t.Helper()
	return strings.Contains(n.ctr(t, "--namespace", namespace, "content", "ls", "--quiet"), b.digest)
}
