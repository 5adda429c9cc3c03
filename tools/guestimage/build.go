package guestimage

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Kind says what is made.
type Kind string

// Kinds.
const (
	Extension Kind = "extension"
	Tarball   Kind = "tarball"
	Initramfs Kind = "initramfs"
)

// Options say what goes in. Paths are those of this machine.
type Options struct {
	Kind Kind
	Arch string // as GOARCH names it: "amd64", "arm64"

	Guest  string // tatami-guest, static
	Pause  string // the process of sandboxes' own containers, static; not in an initramfs
	Config string // guest.toml to include; "" includes none

	// Of an extension.
	CDH    string // a real Confidential Data Hub; "" for none
	Verity bool   // partitions: the file system and its hash tree
	Salt   []byte // of the hash tree; nil derives it from the content

	// Of an initramfs, which takes the machine's own architecture.
	Modules string // /lib/modules/<release> of the kernel that will boot it
	Runtime string // OCI runtime
}

// Result describes what was made.
type Result struct {
	Kind   Kind          `json:"kind"`
	File   string        `json:"file"`
	Arch   string        `json:"arch"`
	Size   int64         `json:"size"`   // bytes
	Digest digest.Digest `json:"digest"` // of the file
	// VerityParams is what Kata's configuration wants to know of an extension as
	// verity_params: empty for one without a hash tree.
	VerityParams string `json:"verity_params"`
	// Requires lists files that programs of the image take from the guest's own
	// root file system: a dynamic linker and libraries, by the names by which they
	// are asked for.
	Requires []string `json:"requires,omitempty"`
}

// Build makes an image and puts it at file when it is whole; a file that is
// there is replaced.
//
// Errors: ErrInvalidArgument for a program that does not fit the guest and for
// options that contradict each other, ErrNotFound for files that are missing.
func Build(file string, o Options) (*Result, error) {
	r, err := build(file, o)
	if err != nil {
		return nil, fmt.Errorf("build guest image %s: %w", file, err)
	}
	return r, nil
}

func build(file string, o Options) (*Result, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	r := &Result{Kind: o.Kind, File: file, Arch: o.Arch}
	err := create(file, func(f *os.File) error {
		if err := o.write(f, r); err != nil {
			return err
		}
		return r.measure(f)
	})
	return r, err
}

func (o *Options) check() error {
	switch o.Kind {
	case Extension, Tarball, Initramfs:
	default:
		return fmt.Errorf("kind %q: want %s, %s or %s: %w", o.Kind, Extension, Tarball, Initramfs, errdefs.ErrInvalidArgument)
	}
	if _, ok := machines[o.Arch]; !ok {
		return fmt.Errorf("architecture %q: want amd64 or arm64: %w", o.Arch, errdefs.ErrInvalidArgument)
	}
	if o.Kind != Extension && (o.Verity || o.CDH != "") {
		return fmt.Errorf("a hash tree and a Confidential Data Hub go with kind %s only: %w", Extension, errdefs.ErrInvalidArgument)
	}
	if len(o.Salt) > 0 && !o.Verity {
		return fmt.Errorf("a salt goes with a hash tree only: %w", errdefs.ErrInvalidArgument)
	}
	if len(o.Salt) > maxSalt {
		return fmt.Errorf("salt of %d bytes: dm-verity takes %d at most: %w", len(o.Salt), maxSalt, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (o *Options) write(f *os.File, r *Result) error {
	switch o.Kind {
	case Extension:
		return o.writeExtension(f, r)
	case Tarball:
		return o.writeTarball(f)
	}
	return o.writeInitramfs(f)
}

// measure notes size and digest of what was written.
func (r *Result) measure(f *os.File) error {
	h := sha256.New()
	var err error
	if _, err = f.Seek(0, io.SeekStart); err == nil {
		r.Size, err = io.Copy(h, f)
	}
	r.Digest = digest.NewDigest(digest.SHA256, h)
	return err
}

// create writes a file beside its final place and moves it there when write
// has succeeded.
func create(file string, write func(f *os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-*")
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644) //nolint:gosec // an image has no secrets: hypervisors of other users read it
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
