// Package initramfs builds the first root file system of a small Linux guest: an
// init, kernel modules with their dependencies, programs of this machine with
// their libraries. The archive is a newc cpio, uncompressed (that boots fastest),
// and equal input gives equal bytes.
//
// Modules lie in /lib/modules/<name>.ko, decompressed; OrderFile lists their paths
// in the order of loading. There are no device nodes: the init mounts a devtmpfs.
package initramfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
)

// OrderFile lists the modules in the guest, one path per line, relative to the
// file's directory.
const OrderFile = "/lib/modules/tatami.order"

// Config says what goes in. Paths of this machine must be absolute.
type Config struct {
	// Init is a static executable; it becomes /init.
	Init string
	// ModuleDir is /lib/modules/<release>, wherever it lies on this machine; empty
	// when Modules and OptionalModules are.
	ModuleDir string
	// Modules must exist or be built in; OptionalModules may be missing.
	Modules, OptionalModules []string
	// Binaries keep their path in the guest. Libraries and interpreters of dynamic
	// ones are found and come along.
	Binaries []string
	// Busybox is a static busybox; it becomes /bin/busybox with a link in /bin for
	// each applet that nothing else provides. Empty for none.
	Busybox string
	// Files are small files by their path in the guest, mode 0644.
	Files map[string][]byte
}

// builder collects the archive's content by guest path.
type builder struct {
	linker
	data  map[string][]byte
	links map[string]string
}

// Build writes the archive to w.
func Build(w io.Writer, cfg Config) error {
	b := &builder{linker: linker{files: map[string]string{}}, data: map[string][]byte{}, links: map[string]string{}}
	if err := b.collect(cfg); err != nil {
		return fmt.Errorf("build initramfs: %w", err)
	}
	if err := b.write(w); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}

func (b *builder) collect(cfg Config) error {
	for name, data := range cfg.Files {
		b.data[path.Clean("/"+name)] = data
	}
	if err := b.modules(cfg); err != nil {
		return err
	}
	var err error
	if b.dirs, err = configuredDirs("/etc/ld.so.conf"); err != nil {
		return err
	}
	for _, bin := range cfg.Binaries {
		if err := b.add(bin); err != nil {
			return err
		}
	}
	if cfg.Busybox != "" {
		if err := b.busybox(cfg.Busybox); err != nil {
			return err
		}
	}
	b.files["/init"] = cfg.Init
	return nil
}

func (b *builder) modules(cfg Config) error {
	if len(cfg.Modules)+len(cfg.OptionalModules) == 0 {
		return nil
	}
	mods, err := resolveModules(cfg.ModuleDir, cfg.Modules, cfg.OptionalModules)
	if err != nil {
		return err
	}
	var order bytes.Buffer
	for _, m := range mods {
		name := m.name + ".ko"
		b.data[path.Join(path.Dir(OrderFile), name)] = m.data
		fmt.Fprintln(&order, name)
	}
	b.data[OrderFile] = order.Bytes()
	return nil
}

func (b *builder) busybox(file string) error {
	out, err := exec.Command(file, "--list").Output() //nolint:noctx // prints a list and ends
	if err != nil {
		return fmt.Errorf("list applets of %s: %w", file, err)
	}
	b.files["/bin/busybox"] = file
	for _, applet := range strings.Fields(string(out)) {
		name := path.Join("/bin", path.Base(applet))
		_, isFile := b.files[name]
		_, isData := b.data[name]
		if !isFile && !isData {
			b.links[name] = "busybox"
		}
	}
	return nil
}

func (b *builder) write(out io.Writer) error {
	w := newWriter(out)
	// Where an init mounts things; harmless when it does not.
	for _, d := range []string{"/dev", "/proc", "/sys", "/tmp", "/run"} {
		w.dir(d)
	}
	names := slices.Concat(slices.Collect(maps.Keys(b.files)), slices.Collect(maps.Keys(b.data)), slices.Collect(maps.Keys(b.links)))
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if err := b.entry(w, name); err != nil {
			return err
		}
	}
	return w.close()
}

func (b *builder) entry(w *writer, name string) error {
	if data, ok := b.data[name]; ok {
		w.file(name, 0o644, int64(len(data)), bytes.NewReader(data))
		return w.err
	}
	if target, ok := b.links[name]; ok {
		w.symlink(name, target)
		return w.err
	}
	f, err := os.Open(b.files[name])
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", b.files[name])
	}
	if err == nil {
		w.file(name, 0o755, st.Size(), f)
		err = w.err
	}
	return errors.Join(err, f.Close())
}
