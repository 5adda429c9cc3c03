package guestimage

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// partitionsOf lets sfdisk read a disk's table and cuts the disk into files.
func partitionsOf(t *testing.T, disk string) (files []string) {
	t.Helper()
	var table struct {
		PartitionTable struct {
			Label      string
			Partitions []struct{ Start, Size int64 } // in sectors
		}
	}
	if err := json.Unmarshal([]byte(tool(t, "sfdisk", "--json", disk)), &table); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for n, p := range table.PartitionTable.Partitions {
		b, err := io.ReadAll(io.NewSectionReader(f, p.Start*sectorSize, p.Size*sectorSize))
		if err != nil || int64(len(b)) != p.Size*sectorSize {
			t.Fatalf("partition %d: %d bytes of %d sectors, %v", n+1, len(b), p.Size, err)
		}
		files = append(files, filepath.Join(dir, fmt.Sprint("p", n+1)))
		if err := os.WriteFile(files[n], b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if table.PartitionTable.Label != "dos" || len(files) != 2 {
		t.Fatalf("%+v", table)
	}
	return files
}

// fields reads verity_params as the guest's mount script does.
func fields(params string) map[string]string {
	m := make(map[string]string)
	for _, f := range strings.Split(params, ",") {
		k, v, _ := strings.Cut(f, "=")
		m[k] = v
	}
	return m
}

// veritysetup runs a command of the real one with the options that the mount
// script gives it.
func veritysetup(t *testing.T, data, hashes, params string) error {
	t.Helper()
	p := fields(params)
	out, err := exec.CommandContext(t.Context(), "veritysetup", "verify", data, hashes, p["root_hash"], "--no-superblock",
		"--hash-block-size="+p["hash_block_size"], "--data-block-size="+p["data_block_size"],
		"--data-blocks="+p["data_blocks"], "--salt="+p["salt"]).CombinedOutput()
	if err != nil {
		return fmt.Errorf("veritysetup: %w: %s", err, out)
	}
	return nil
}

func TestMeasuredExtension(t *testing.T) {
	for name, salt := range map[string][]byte{"own salt": nil, "given salt": {1, 2, 3}} {
		t.Run(name, func(t *testing.T) {
			o := sources(t, Options{Kind: Extension, Arch: "arm64", Verity: true, Salt: salt})
			r := make1(t, o)
			if got := fields(r.VerityParams)["salt"]; salt != nil && got != "010203" {
				t.Errorf("salt %s", got)
			}
			if r.Size%alignment != 0 {
				t.Errorf("a disk of %d bytes", r.Size)
			}
			parts := partitionsOf(t, r.File)
			if err := veritysetup(t, parts[0], parts[1], r.VerityParams); err != nil {
				t.Fatal(err)
			}
			o.Verity, o.Salt = false, nil
			if raw := make1(t, o); read(t, raw.File) != read(t, parts[0]) || raw.VerityParams != "" {
				t.Errorf("the first partition is not the raw extension (%q)", raw.VerityParams)
			}
			b := []byte(read(t, parts[0]))
			b[len(b)-1] ^= 1
			if err := os.WriteFile(parts[0], b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := veritysetup(t, parts[0], parts[1], r.VerityParams); err == nil {
				t.Error("a changed byte was not found")
			}
		})
	}
}

// TestHashTree builds trees where the number of levels changes.
func TestHashTree(t *testing.T) {
	const sums = verityBlock / 32 // in a block
	for _, blocks := range []int{2, 3, sums, sums + 1, sums*sums - 1, sums * sums, sums*sums + 1} {
		data := make([]byte, blocks*verityBlock)
		_, _ = rand.Read(data[:verityBlock]) // never fails
		copy(data[len(data)-1:], "x")
		salt := contentSalt(data)
		hashes, root := hashTree(data, salt)
		dir := t.TempDir()
		for name, b := range map[string][]byte{"data": data, "hashes": hashes} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := veritysetup(t, filepath.Join(dir, "data"), filepath.Join(dir, "hashes"), verityParams(root, salt, blocks)); err != nil {
			t.Errorf("%d blocks: %v", blocks, err)
		}
		// The real one makes the same tree.
		theirs := filepath.Join(dir, "theirs")
		if err := os.WriteFile(theirs, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		out := tool(t, "veritysetup", "format", filepath.Join(dir, "data"), theirs, "--no-superblock", "--salt", fmt.Sprintf("%x", salt))
		if !strings.Contains(out, fmt.Sprintf("%x", root)) || !bytes.Equal([]byte(read(t, theirs)), hashes) {
			t.Errorf("%d blocks: another tree\n%s", blocks, out)
		}
	}
}
