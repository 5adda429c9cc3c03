package daemon

import (
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// canary is in every password here.
const canary = "canary-41d7"

// pullSecret writes what a pull secret holds.
func pullSecret(t *testing.T, path, host, password string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	login := base64.StdEncoding.EncodeToString([]byte("user:" + password))
	if err := os.WriteFile(path, fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, host, login), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRegistryCredentials reads a private image by the guest's own credentials, through
// a rotation and the end of the worker. What it says and keeps has no password.
func TestRegistryCredentials(t *testing.T) {
	t.Setenv("HOME", "") // as kata-agent may start it
	n := newNode(t)
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: canary + "-1"}})
	const files = 8
	entries := []registrytest.Entry{registrytest.Dir("data", 0o755)}
	for i := range files {
		entries = append(entries, registrytest.File(samplePath(i), 0o644, sampleContent(i)))
	}
	layer := registrytest.Must(registrytest.EStargz(registrytest.Must(registrytest.Tar(entries...))))
	reg.PushImage("toc", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
	dir := t.TempDir()
	config, secrets := filepath.Join(dir, "config.json"), filepath.Join(dir, "secrets")
	pullSecret(t, filepath.Join(secrets, "mine", ".dockerconfigjson"), reg.Host(), canary+"-1")
	g := startGuest(t, n, "--registry", "true", "--host-address", "", "--relay-address", "", "--credentials", config+","+secrets)
	root := g.mustPull("c1", reg.Host()+"/toc:v1")
	read := func(i int) error {
		b, err := readAll(filepath.Join(root, samplePath(i)))
		if err == nil && b != sampleContent(i) {
			err = fmt.Errorf("%d bytes, which are others", len(b))
		}
		return err
	}
	rotate := func(password string) {
		reg.SetPassword(password)
		reg.ExpireTokens()
	}
	for i, step := range []func(){
		func() {},
		func() { reg.ExpireTokens() },
		func() { // the secret is mounted anew
			rotate(canary + "-2")
			pullSecret(t, filepath.Join(secrets, "mine", ".dockerconfigjson"), reg.Host(), canary+"-2")
		},
		func() { // a config.json appears, and comes first
			rotate(canary + "-3")
			pullSecret(t, config, reg.Host(), canary+"-3")
		},
		func() {
			if err := unix.Kill(g.workerPID(), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		},
	} {
		step()
		dropCaches(t)
		before := len(reg.Requests("/blobs/"))
		if err := read(files - 1 - i); err != nil {
			t.Errorf("step %d: %v", i, err)
		}
		if len(reg.Requests("/blobs/")) == before {
			t.Errorf("step %d: the registry was not asked", i)
		}
	}
	g.connect()
	rotate(canary + "-4") // and nobody has it
	if _, err := g.pull("c2", reg.Host()+"/toc:v1"); err == nil || strings.Contains(err.Error(), canary) {
		t.Errorf("pulled without a password: %v", err)
	}
	if strings.Contains(g.log.String(), canary) {
		t.Error("a password is in the log")
	}
	g.checkSecret(t)
}

// checkSecret looks for passwords in what the guest keeps, was started with, and has
// mounted.
func (g *guest) checkSecret(t *testing.T) {
	t.Helper()
	planted := g.path("state/planted") // so that the search is known to find
	if err := os.WriteFile(planted, []byte(canary), 0o600); err != nil {
		t.Fatal(err)
	}
	var found []string
	look := func(path string) {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), canary) {
			found = append(found, path)
		}
	}
	home, err := os.Stat(g.dir)
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(g.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if info.Sys().(*syscall.Stat_t).Dev != home.Sys().(*syscall.Stat_t).Dev { // a mount
			return fs.SkipDir
		}
		if info.Mode().IsRegular() {
			look(path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{g.cmd.Process.Pid, g.workerPID()} {
		for _, name := range []string{"cmdline", "environ", "mountinfo"} {
			look(fmt.Sprintf("/proc/%d/%s", pid, name))
		}
	}
	if !slices.Equal(found, []string{planted}) {
		t.Errorf("a password is in %q (planted: %s)", found, planted)
	}
	if err := os.Remove(planted); err != nil {
		t.Fatal(err)
	}
}

// TestNoHome pulls without any place of credentials.
func TestNoHome(t *testing.T) {
	t.Setenv("HOME", "")
	n := newNode(t)
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{Delay: time.Millisecond}}) // tokens for everybody
	reg.PushImage("x", "v1", registrytest.Image{Layers: []registrytest.Layer{gz(registrytest.File("a", 0o644, "hello"))}})
	g := startGuest(t, n, "--registry", "true", "--host-address", "", "--relay-address", "")
	root := g.mustPull("c1", reg.Host()+"/x:v1")
	if b, err := os.ReadFile(filepath.Join(root, "a")); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}
