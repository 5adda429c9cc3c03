package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os/exec"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

// zstdFrames compresses with pzstd, which ends a frame every few MB and tells
// the size of each one in a skippable frame before it.
func zstdFrames(to ocilayout.Dir, s source) (ocispec.Descriptor, digest.Digest, error) {
	plain, err := gzip.NewReader(s.file)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	desc, err := to.PutFrom(ocispec.MediaTypeImageLayerZstd, func(w io.Writer) error {
		return filter(plain, w, "pzstd", "-q", "-c", "-p", "2")
	})
	return desc, s.diffID, err
}

// filter runs a program; its error tells what the program said.
func filter(in io.Reader, out io.Writer, name string, args ...string) error {
	cmd := exec.Command(name, args...) //nolint:noctx // a person waits for it and can interrupt it
	var msg bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &msg
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, msg.Bytes())
	}
	return nil
}
