package checknode

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"
)

func TestHostileFiles(t *testing.T) {
	const main = "etc/containerd/config.toml"
	for _, c := range []struct {
		name  string
		files files
		after func(root string) error
		want  string // in a finding about the node
	}{
		{"imports in a circle", files{main: "version = 3\nimports = [\"a.toml\"]\n", "etc/containerd/a.toml": "imports = [\"b.toml\", \"config.toml\"]\n",
			"etc/containerd/b.toml": "imports = [\"./a.toml\", \"*.toml\", \"../containerd/*\"]\n"}, nil, "no handler"},
		{"imports without end", chain(200), nil, "more than 128 files"},
		{"an import that is not there", files{main: "imports = [\"no.toml\"]\n"}, nil, "/etc/containerd/no.toml: no such file"},
		{"a bad pattern", files{main: "imports = [\"[*.toml\"]\n"}, nil, "pattern /etc/containerd/[*.toml"},
		{"broken", files{main: "version = 3\n[plugins\n"}, nil, "config.toml: line 2, column 9"},
		{"broken import", files{main: "imports = [\"a.toml\"]\n", "etc/containerd/a.toml": "\n\nx = \n"}, nil, "a.toml: line 3, column 5"},
		{"wrong types", files{main: "version = \"3\"\nimports = \"x\"\nplugins = 1\nproxy_plugins = []\ndisabled_plugins = {}\n",
			"etc/tatami/host.toml": "state = 1\nsnapshotter = [1, \"x\", {name = 2, fallback = \"x\"}]\nkata = 3\n"}, nil, `the mode ""`},
		{"no UTF-8", files{main: "version = 3\nx = \"\xff\"\n"}, nil, "config.toml: line 2"},
		{"huge", files{}, func(root string) error { return sparse(filepath.Join(root, main), 1<<40) }, "longer than"},
		{"deep", files{main: "x = " + strings.Repeat("[", maxSettings-8)}, nil, "config.toml"},
		{"deep keys", files{main: strings.Repeat("a.", 1<<18) + "a = 1"}, nil, "nested more than 32 deep"},
		{"a directory", files{main + "/x": ""}, nil, "is no file"},
		{"a pipe", files{}, func(root string) error { return unix.Mkfifo(filepath.Join(root, main), 0o600) }, "is no file"},
		{"a link to itself", files{}, func(root string) error { return os.Symlink("config.toml", filepath.Join(root, main)) }, "too many links"},
		{"a link out of the root", files{}, func(root string) error {
			return os.Symlink("../../../../../../../../etc/passwd", filepath.Join(root, main))
		}, "config.toml: no such file"},
		{"an absolute link", files{"srv/x.toml": "version = 9\n"}, func(root string) error {
			return os.Symlink("/srv/x.toml", filepath.Join(root, main))
		}, "configuration of version 9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := c.files.write(t)
			if err := os.MkdirAll(filepath.Join(root, "etc/containerd"), 0o755); err != nil {
				t.Fatal(err)
			}
			if c.after != nil {
				if err := c.after(root); err != nil {
					t.Fatal(err)
				}
			}
			r, err := Check(t.Context(), Options{Root: root, Version: "2.4.2"})
			if err != nil {
				t.Fatal(err)
			}
			if text := fmt.Sprint(r.Findings); !strings.Contains(text, c.want) || r.Works {
				t.Errorf("works: %v, %.2000s", r.Works, text)
			}
		})
	}
}

// chain is a row of files of which each imports the next.
func chain(n int) files {
	f := files{"etc/containerd/config.toml": "imports = [\"0.toml\"]\n"}
	for i := range n {
		f[fmt.Sprintf("etc/containerd/%d.toml", i)] = fmt.Sprintf("imports = [\"%d.toml\"]\n", i+1)
	}
	return f
}

func sparse(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

// Links are followed inside the node.
func TestResolve(t *testing.T) {
	root := files{"etc/a/f": "x", "opt/f": "y"}.write(t)
	for name, target := range map[string]string{"etc/up": "../../../opt", "etc/abs": "/opt/f", "etc/a/dot": "./../a/./f", "loop": "loop2", "loop2": "/loop"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	tr, err := openTree(root)
	if err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]string{
		"/etc/up/f": "/opt/f", "/etc/abs": "/opt/f", "/etc/a/dot": "/etc/a/f", "/etc/up/../opt/f": "/opt/f", "/../../etc/a/f": "/etc/a/f", "/": "/",
		"/loop": "", "/etc/a/f/x": "", "/nothing": "",
	} {
		got, err := tr.resolve(p)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%s: %s, %v", p, got, err)
		}
	}
}

func TestRootMustBeThere(t *testing.T) {
	file := filepath.Join(files{"f": ""}.write(t), "f")
	for _, o := range []Options{{Root: "/no/such/root"}, {Root: file}, {Root: t.TempDir(), Containerd: "config.toml"}, {Root: t.TempDir(), Version: "two"}} {
		if r, err := Check(t.Context(), o); err == nil {
			t.Errorf("%+v: %+v", o, r)
		}
	}
}

// Whatever files say, there is a report: no panic, no file outside the node's.
func FuzzCheck(f *testing.F) {
	for _, v := range []string{"1.6.20", "1.7.27", "2.4.2", "x"} {
		f.Add("version = 3\nimports = [\"*.toml\"]\n", "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.k]\nruntime_type = \"io.containerd.kata.v2\"\nsnapshotter = \"tatami\"\n",
			kataQEMU, "[[hypervisor.qemu.guest_extension_images]]\nname = \"coco\"\n", "[[snapshotter]]\nname = \"tatami\"\nmode = \"guest\"\n", v)
		f.Add("version = 2\n[plugins.cri.containerd.runtimes.k]\nruntime_type = 1\n", "plugins = 1", "runtime = 3", "x = [", "snapshotter = 1", v)
	}
	f.Fuzz(func(t *testing.T, main, imported, kata, dropIn, host, version string) {
		n := node{opts: Options{Containerd: "/etc/containerd/config.toml", Host: HostFile, Version: version}, files: tree{fstest.MapFS{
			"etc/containerd/config.toml": {Data: []byte(main)}, "etc/containerd/x.toml": {Data: []byte(imported)},
			local(rustFiles[0]):                            {Data: []byte(kata)},
			local(path.Dir(rustFiles[0]) + "/config.d/50"): {Data: []byte(dropIn)}, local(HostFile): {Data: []byte(host)},
		}}}
		r := n.check(t.Context())
		if r.Works && len(r.Handlers) == 0 {
			t.Error("works without a handler")
		}
		for _, h := range r.Handlers {
			for _, f := range append(r.Findings, h.Findings...) {
				if f.What == "" || f.File != "" && !path.IsAbs(f.File) {
					t.Errorf("%+v", f)
				}
			}
		}
	})
}

func TestVersions(t *testing.T) {
	for line, want := range map[string]string{
		"containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3":                  "1.6.20~ds1",
		"containerd github.com/containerd/containerd/v2 v2.4.0-beta.0 301026e58c619e63d09c0ec411012e5": "2.4.0-beta.0",
		"containerd containerd.io 1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da":                     "1.7.27",
		"containerd github.com/k3s-io/containerd v2.2.2-k3s1 ":                                         "2.2.2-k3s1",
		"": "", "containerd x": "", "containerd x y z": "", "runc version 1.2": "", "containerd x -1.2": "", "containerd x 1": "",
	} {
		got, err := versionLine(line)
		if got.text != want || (err != nil) != (want == "") {
			t.Errorf("%q: %v, %v", line, got, err)
		}
	}
	v, _ := parseVersion("1.10.2")
	if !v.atLeast(1, 7) || v.atLeast(1, 11) || v.atLeast(2, 0) {
		t.Error("versions are compared as numbers")
	}
}
