// Package deps holds the direction of imports: what each part of the module
// may link, also indirectly, which a linter that looks at single files does
// not see.
package deps

import (
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/tatami-containers/tatami/"

// rules say which packages must not be linked into which programs and
// packages, and why.
var rules = []struct {
	of     string   // package pattern
	banned []string // prefixes of import paths
	why    string
}{
	{module + "guest/...", []string{module + "host", module + "tools", module + "tests"}, "guest and host meet in protocols only"},
	{module + "guest/...", []string{"github.com/containerd/containerd/"}, "containerd's module would double the guest's binary"},
	{module + "rootfs/...", []string{"github.com/containerd/containerd/"}, "containerd's module belongs to host only"},
	{module + "protocols/...", []string{"github.com/containerd/containerd/"}, "containerd's module belongs to host only"},
	{module + "tools/...", []string{"github.com/containerd/containerd/"}, "containerd's module belongs to host only"},
	{module + "host/...", []string{module + "guest", module + "tools", module + "tests"}, "guest and host meet in protocols only"},
	{module + "tools/...", []string{module + "guest", module + "host", module + "tests"}, "tools start the daemons as programs"},
	{module + "rootfs/...", []string{module + "guest", module + "host", module + "tools", module + "tests"}, "the base knows nothing of the daemons"},
	{module + "virtiofs/...", []string{module + "guest", module + "host", module + "tools", module + "tests"}, "the base knows nothing of the daemons"},
	{module + "protocols/...", []string{module + "rootfs", module + "guest", module + "host", module + "tools", module + "virtiofs", module + "tests"}, "protocols imports nothing of ours"},
	{module + "rootfs/index", []string{module + "rootfs/store", module + "rootfs/layer", module + "rootfs/registry", module + "rootfs/mount", "net/http"}, "index is the bottom and does no I/O"},
	{module + "rootfs/layer/...", []string{module + "rootfs/store", module + "rootfs/mount", module + "rootfs/registry", "net/http"}, "formats take bytes from whoever has them"},
	{module + "rootfs/bootstrap", []string{module + "rootfs/store", module + "rootfs/layer", module + "rootfs/mount", "net/http"}, "the bootstrap is made of entries alone"},
	{module + "guest/...", []string{"go.yaml.in/yaml", module + "rootfs/registry/hosts", module + "rootfs/registry/credentials/kube"}, "a guest has no mirrors, no kubelet and no cluster"},
	{module + "rootfs/registry/...", []string{module + "rootfs/store", module + "rootfs/mount", module + "rootfs/layer"}, "the registry client knows nothing of the store"},
	{module + "rootfs/store", []string{module + "rootfs/layer", module + "rootfs/registry", module + "rootfs/mount", "net/http"}, "the store knows sources, not formats or networks"},
	{module + "guest/...", []string{"github.com/prometheus"}, "a guest's counters go to the node"},
	{module + "rootfs/...", []string{"github.com/prometheus"}, "the base counts in plain numbers"},
	{module + "tools/...", []string{"github.com/prometheus"}, "metrics are made in host/metrics"},
	{module + "host/service", []string{"github.com/hanwen/go-fuse"}, "only host/mounts mounts; go-fuse stays behind rootfs/mount and virtiofs"},
	{module + "host/snapshotter", []string{"github.com/hanwen/go-fuse"}, "only host/mounts mounts; go-fuse stays behind rootfs/mount and virtiofs"},
	{module + "...", []string{"github.com/erofs/go-erofs", "github.com/containerd/stargz-snapshotter"}, "builders and readers of others are for tests only"},
}

func TestImports(t *testing.T) {
	for _, r := range rules {
		for _, pkg := range list(t, r.of) {
			if strings.HasPrefix(pkg, module+"tests") {
				continue
			}
			for _, dep := range list(t, "-deps", pkg) {
				for _, b := range r.banned {
					if dep == b || strings.HasPrefix(dep, strings.TrimSuffix(b, "/")+"/") {
						t.Errorf("%s links %s: %s", strings.TrimPrefix(pkg, module), strings.TrimPrefix(dep, module), r.why)
					}
				}
			}
		}
	}
}

// cache of `go list` answers, by their arguments.
var cache = map[string][]string{}

func list(t *testing.T, args ...string) []string {
	t.Helper()
	key := strings.Join(args, " ")
	if l, ok := cache[key]; ok {
		return l
	}
	out, err := exec.CommandContext(t.Context(), "go", append([]string{"list"}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list %s: %v", key, err)
	}
	cache[key] = strings.Fields(string(out))
	return cache[key]
}
