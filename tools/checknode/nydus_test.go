package checknode

import (
	"slices"
	"strings"
	"testing"
)

const nydusDrop = "etc/kata-containers/tatami-nydus/config.d/60-tatami.toml"

// withNydus is a node with the handler of install.md's section on virtio-fs-nydus, in
// the place of the one of mode share.
func withNydus(t *testing.T) files {
	t.Helper()
	f := installed(t)
	delete(f, shareConf)
	for _, name := range []string{ctrdFile, "etc/tatami/host.toml"} {
		f[name] = strings.ReplaceAll(f[name], "tatami-share", "tatami-nydus")
	}
	sub(t, f, "etc/tatami/host.toml", "mode = \"share\"\nfallback = [\"full\"]", "mode = \"nydus\"\nfallback = [\"share\", \"full\"]")
	f["etc/kata-containers/tatami-nydus/configuration.toml"] = kataQEMU
	f[nydusDrop] = shipped(t, "kata/qemu-runtime-rs-nydus.toml")
	f["opt/tatami/bin/tatami-virtiofsd"] = program
	f["usr/local/bin/nydus-overlayfs"] = program
	return f
}

func TestNydus(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, f files)
		of     string
		what   string // "" when all is well
		add    string
	}{
		{"as installed", func(*testing.T, files) {}, "", "", ""},
		{"Go runtime", func(t *testing.T, f files) {
			f["etc/kata-containers/tatami-nydus/configuration.toml"] = kataGo
			f[nydusDrop] = shipped(t, "kata/qemu-nydus.toml")
		}, "", "", ""},
		{"shared_fs", func(t *testing.T, f files) { sub(t, f, nydusDrop, `shared_fs = "virtio-fs-nydus"`, "") },
			"kata-tatami-nydus", `it is "virtio-fs"`, `shared_fs = "virtio-fs-nydus"`},
		{"daemon", func(t *testing.T, f files) { sub(t, f, nydusDrop, "bin/tatami-virtiofsd", "bin/nydusd") },
			"kata-tatami-nydus", "virtio_fs_daemon is /opt/tatami/bin/nydusd", `virtio_fs_daemon = "/opt/tatami/bin/tatami-virtiofsd"`},
		{"daemon's file", func(_ *testing.T, f files) { delete(f, "opt/tatami/bin/tatami-virtiofsd") },
			"kata-tatami-nydus", "tatami-virtiofsd, which is not there", ""},
		{"passthrough", func(t *testing.T, f files) { sub(t, f, nydusDrop, `["--passthrough"]`, `["--thread-pool-size=1"]`) },
			"kata-tatami-nydus", "has no --passthrough", `virtio_fs_extra_args = ["--passthrough"]`},
		{"another VMM", func(t *testing.T, f files) {
			f["etc/kata-containers/tatami-nydus/configuration.toml"] = kataFirecracker
		},
			"kata-tatami-nydus", "needs QEMU", ""},
		{"helper", func(_ *testing.T, f files) { delete(f, "usr/local/bin/nydus-overlayfs") },
			"", "nydus-overlayfs is not there", "ln -s /opt/tatami/bin/nydus-overlayfs-tatami /usr/local/bin/nydus-overlayfs"},
		{"runc", func(t *testing.T, f files) {
			f["etc/containerd/config.toml"] += "[plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"tatami-nydus\"\n"
		}, "runc", "mode nydus needs Kata Containers", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := withNydus(t)
			c.change(t, f)
			r, err := Check(t.Context(), Options{Root: f.write(t), Version: "2.4.2"})
			if err != nil {
				t.Fatal(err)
			}
			if c.what == "" {
				if list := findingsOf(r, "kata-tatami-nydus"); !mode(r, "kata-tatami-nydus", modeNydus) || failed(list) {
					t.Errorf("%+v", r)
				}
				return
			}
			list := findingsOf(r, c.of)
			i := slices.IndexFunc(list, func(f Finding) bool { return f.Severity == Error && strings.Contains(f.What, c.what) })
			if i < 0 || c.add != "" && !slices.Contains(list[i].Add, c.add) || r.Works {
				t.Errorf("works %v, %+v", r.Works, list)
			}
		})
	}
}

func mode(r *Report, handler, want string) bool {
	return slices.ContainsFunc(r.Handlers, func(h Handler) bool { return h.Name == handler && h.Mode == want })
}
