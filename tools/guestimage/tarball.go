package guestimage

import (
	"archive/tar"
	"errors"
	"os"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Places in a guest image of one's own.
const (
	unitPath = "usr/lib/systemd/system/tatami-guest.service"
	wantPath = "etc/systemd/system/kata-containers.target.wants/tatami-guest.service"
)

// unit starts tatami-guest before the agent, which looks for the socket once.
// With agent.guest_components_procs=none it finds the socket without having
// started anything (kata-containers: src/agent/src/main.rs, start_sandbox).
// The settings of the service are those of Kata's own agent, which starts
// tatami-guest where it comes as an extension: in a guest that is out of memory
// a container must end first.
const unit = `[Unit]
Description=Tatami, container images for kata-agent
Documentation=https://github.com/tatami-containers/tatami
Before=kata-agent.service

[Service]
Type=notify
ExecStart=/usr/bin/tatami-guest
KillMode=mixed
LimitNOFILE=1048576
OOMScoreAdjust=-997
StandardOutput=tty
StandardError=tty

[Install]
WantedBy=kata-containers.target
`

// writeTarball writes files to unpack over the root file system of a guest
// image, as osbuilder does with GUEST_HOOKS_TARBALL and
// COCO_GUEST_COMPONENTS_TARBALL, which must be zstd archives (kata-containers:
// tools/osbuilder/rootfs-builder/rootfs.sh). The pause bundle lies where the
// agent looks without an extension.
func (o *Options) writeTarball(f *os.File) error {
	t, err := o.common()
	if err != nil {
		return err
	}
	t.text(unitPath, unit)
	t.symlink(wantPath, "/"+unitPath)
	// One thread: how blocks are cut must not depend on the machine.
	z, err := zstd.NewWriter(f, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	w := tar.NewWriter(z)
	if err := writeTar(w, t); err != nil {
		return errors.Join(err, z.Close())
	}
	return errors.Join(w.Close(), z.Close())
}

// writeTar writes no entries of directories: those that a root file system has
// keep their attributes.
func writeTar(w *tar.Writer, t tree) error {
	for _, name := range t.names() {
		f := t[name]
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: int64(f.mode), Size: int64(len(f.data)),
			ModTime: time.Unix(0, 0), Uname: "root", Gname: "root", Format: tar.FormatUSTAR}
		if f.link != "" {
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(f.data); err != nil {
			return err
		}
	}
	return nil
}
