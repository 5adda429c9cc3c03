package containerd

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// The settings of a tatami-host that the kubelet pulls through.
const (
	criSocket   = hostState + "/cri.sock"
	criSettings = share + "[cri]\nimage_service = \"" + criSocket + "\"\n[log]\nlevel = \"debug\"\n"
)

// canary is in every password here.
const canary = "canary-5e9b"

// kubelet is crictl with the image service that the kubelet has.
func (n *node) kubelet(t testing.TB, args ...string) (string, error) {
	t.Helper()
	all := n.crictlArgs(args...)
	return n.try(t, append([]string{all[0], "--image-endpoint", "unix://" + criSocket}, all[1:]...)...)
}

func (n *node) mustKubelet(t testing.TB, args ...string) string {
	t.Helper()
	out, err := n.kubelet(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestPulledCredentials pulls a private image as the kubelet does, and has a
// container read it: through the ends of everything that knows its password, and
// through a rotation. The password is nowhere but in memory, and is gone with the
// image.
func TestPulledCredentials(t *testing.T) {
	w := ways[0]
	r := &rig{node: newNode(t, releases[w.rel]), reg: startRegistry(t)}
	r.host = r.node.host(t, criSettings)
	r.containerd = r.node.containerd(t, setup{Pause: r.reg.pushPause(t), Snapshotter: "tatami", Proxies: []proxy{r.proxyOf("tatami")}})
	app := r.reg.pushApp(t, "private/app", 1)
	r.reg.protect(app.repo, canary+"-1")
	for _, args := range [][]string{{"pull", app.ref}, {"pull", "--creds", "u:" + canary + "-wrong", app.ref}} {
		// crictl says what it was called with.
		out, err := r.kubelet(t, args...)
		if err == nil || strings.Contains(strings.ReplaceAll(out+err.Error(), strings.Join(args, " "), ""), canary) {
			t.Errorf("pulled without the password: %v", err)
		}
	}
	r.mustKubelet(t, "pull", "--creds", "u:"+canary+"-1", app.ref)
	for _, args := range [][]string{{"images", "--output", "json"}, {"inspecti", app.ref}, {"imagefsinfo", "--output", "table"}} {
		if got, want := r.mustKubelet(t, args...), r.run(t, r.crictlArgs(args...)...); got != want && args[0] != "imagefsinfo" || got == "" {
			t.Errorf("%s by tatami-host: %s, by containerd: %s", args, got, want) // usage changes
		}
	}
	pod := r.pod(t, "reader", "")
	id := r.create(t, pod, container{name: "reader", image: app.ref, user: "root", command: []string{"sleep", "1000000"}})
	if got := r.exec(t, id, "cat", "/data/greeting"); got != greeting {
		t.Errorf("the container reads %q, want %q", got, greeting)
	}
	r.checkLazy(t, r.reg, app)
	next := largeSize/part - 1 // backwards: what is fetched may reach into the part behind
	fetches := func(t *testing.T) {
		t.Helper()
		before := r.reg.sent(app.repo, app.layers[1])
		r.readsPart(t, id, next)
		next--
		if r.reg.sent(app.repo, app.layers[1]) == before {
			t.Error("the registry was not asked")
		}
	}
	for _, step := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"worker killed", r.killWorker},
		{"upgrade", r.upgrade},
		{"tatami-host", r.hostAnew(syscall.SIGTERM)},
		{"tatami-host killed", r.hostAnew(syscall.SIGKILL)},
		{"containerd", r.containerdAnew(syscall.SIGTERM)},
		{"rotation", func(t *testing.T) {
			r.reg.protect(app.repo, canary+"-2")
			r.mustKubelet(t, "pull", "--creds", "u:"+canary+"-2", app.ref)
		}},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.do(t)
			fetches(t)
		})
	}
	r.checkSecret(t)
	if mem := r.remembered(t); !strings.Contains(mem, canary+"-2") {
		t.Error("the password is not where it should be")
	}
	r.removePod(t, pod)
	r.mustKubelet(t, "rmi", app.ref)
	until(t, func() error {
		if strings.Contains(r.remembered(t), canary) {
			return errRemembered
		}
		return nil
	})
}

var errRemembered = errors.New("the password of a removed image is remembered")

// remembered is the memory that the manager keeps for tatami-host.
func (r *rig) remembered(t testing.TB) string {
	t.Helper()
	r.manager.mu.Lock()
	defer r.manager.mu.Unlock()
	f := r.manager.store["tatami-cri"]
	if f == nil {
		t.Fatal("tatami-host has given the manager no memory")
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// checkSecret looks for passwords in all files of the node (not in its images), in
// what its processes were started with, in mounts, and in what tatami says.
func (r *rig) checkSecret(t testing.TB) {
	t.Helper()
	planted := filepath.Join(r.dir, "planted") // so that the search is known to find
	if err := os.WriteFile(planted, []byte("x\x00"+canary), 0o600); err != nil {
		t.Fatal(err)
	}
	pattern := "[c]" + canary[1:] // the search itself does not have it
	found := r.run(t, "sh", "-c", `find "$0" /run /opt -xdev -type f -exec grep -las -e "$1" {} + ; grep -las -e "$1" /proc/[0-9]*/cmdline /proc/[0-9]*/environ /proc/[0-9]*/mountinfo; :`, r.dir, pattern)
	if found != planted+"\n" {
		t.Errorf("a password is in:\n%s(planted: %s)", found, planted)
	}
	if strings.Contains(r.status(t), canary) {
		t.Error("a password is in what tatami status says")
	}
}
