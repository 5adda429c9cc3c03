package main

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

// maxInitdata bounds an initdata device's content in bytes.
const maxInitdata = 4 << 20

// initdata writes the files of an initdata device, if there is one: a disk that
// begins with the word initdata, a length, and gzipped TOML
// (src/agent/src/initdata.rs; src/libs/kata-types/src/initdata.rs).
func (a *agent) initdata() error {
	disks, err := filepath.Glob("/dev/[vs]d*")
	if err != nil {
		return err
	}
	for _, disk := range disks {
		text, err := readInitdata(disk)
		if err != nil {
			return fmt.Errorf("initdata of %s: %w", disk, err)
		}
		if text != nil {
			return writeInitdata(text)
		}
	}
	return nil
}

// readInitdata returns nil for a disk of another kind.
func readInitdata(disk string) ([]byte, error) {
	f, err := os.Open(disk)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var head [16]byte
	if _, err := io.ReadFull(f, head[:]); err != nil || string(head[:8]) != "initdata" {
		return nil, nil // too small or another's
	}
	z, err := gzip.NewReader(io.LimitReader(f, int64(binary.LittleEndian.Uint64(head[8:]))))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(z, maxInitdata))
}

func writeInitdata(text []byte) error {
	var doc struct {
		Version   string            `toml:"version"`
		Algorithm string            `toml:"algorithm"`
		Data      map[string]string `toml:"data"`
	}
	if err := toml.NewDecoder(bytes.NewReader(text)).Decode(&doc); err != nil {
		return err
	}
	if doc.Version != "0.1.0" || doc.Algorithm != "sha256" {
		return fmt.Errorf("initdata version %q, algorithm %q", doc.Version, doc.Algorithm)
	}
	if err := os.MkdirAll(initdataDir, 0o755); err != nil {
		return err
	}
	files := map[string]string{"initdata.toml": string(text)}
	for _, name := range []string{"aa.toml", "cdh.toml"} {
		if data, ok := doc.Data[name]; ok {
			files[name] = data
		}
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(initdataDir, name), []byte(data), 0o600); err != nil {
			return err
		}
	}
	return nil
}
