package estargz

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	builder "github.com/containerd/stargz-snapshotter/estargz"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

const sum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParseErrors(t *testing.T) {
	reg := func(fields string) string {
		return `{"name":"f","type":"reg","chunkDigest":"` + sum + `",` + fields + `}`
	}
	chunk := func(fields string) string {
		return `{"name":"f","type":"chunk","chunkDigest":"` + sum + `",` + fields + `}`
	}
	cases := []struct{ name, entries, says string }{
		{"escape", `{"name":"../x","type":"dir"}`, "out of the layer"},
		{"zero byte", `{"name":"a\u0000b","type":"dir"}`, "zero byte"},
		{"root file", `{"name":"./","type":"reg"}`, "root"},
		{"type", `{"name":"x","type":"socket"}`, "unknown type"},
		{"chunk of nothing", chunk(`"offset":1,"chunkSize":5`), "no file"},
		{"chunk of a directory", `{"name":"d","type":"dir"},` + chunk(`"offset":1,"chunkSize":5`), "no file"},
		{"chunk behind the end", reg(`"size":5,"offset":1`) + "," + chunk(`"offset":2,"chunkOffset":5,"chunkSize":1`), "no file"},
		{"missing chunk", reg(`"size":10,"offset":1,"chunkSize":5`), "5 of its 10"},
		{"missing chunk, then another", reg(`"size":10,"offset":1,"chunkSize":5`) + `,{"name":"d","type":"dir"}`, "5 of its 10"},
		{"gap", reg(`"size":10,"offset":1,"chunkSize":5`) + "," + chunk(`"offset":2,"chunkOffset":6,"chunkSize":4`), "does not follow"},
		{"overlap", reg(`"size":10,"offset":1,"chunkSize":5`) + "," + chunk(`"offset":2,"chunkOffset":4,"chunkSize":6`), "does not follow"},
		{"too long", reg(`"size":10,"offset":1,"chunkSize":11`), "does not follow"},
		{"negative size", reg(`"size":-1`), "size of -1"},
		{"huge size", reg(`"size":9223372036854775807,"offset":1`), "size of"},
		{"negative chunk", reg(`"size":10,"offset":1,"chunkSize":-5`), "does not follow"},
		{"chunk at the start", reg(`"size":10,"offset":1,"chunkOffset":2`), "does not follow"},
		{"huge chunk", reg(`"size":16777217,"offset":1`), "convert the image"},
		{"negative offset", reg(`"size":5,"offset":-1`), "chunk at byte -1"},
		{"offset in the TOC", reg(`"size":5,"offset":1000`), "chunk at byte 1000"},
		{"negative inner offset", reg(`"size":5,"offset":1,"innerOffset":-1`), "chunk at byte 1"},
		{"huge inner offset", reg(`"size":5,"offset":1,"innerOffset":9223372036854775807`), "chunk at byte 1"},
		{"members go back", reg(`"size":5,"offset":9`) + "," + reg(`"size":5,"offset":8`), "overlaps"},
		{"chunks overlap in a member", reg(`"size":5,"offset":9`) + "," + reg(`"size":5,"offset":9,"innerOffset":4`), "overlaps"},
		{"no digest", `{"name":"f","type":"reg","size":5,"offset":1}`, "SHA-256"},
		{"short digest", `{"name":"f","type":"reg","size":5,"offset":1,"chunkDigest":"sha256:00"}`, "SHA-256"},
		{"other digest", `{"name":"f","type":"reg","size":5,"offset":1,"chunkDigest":"` + strings.Repeat("z", 71) + `"}`, "SHA-256"},
		{"hexless digest", `{"name":"f","type":"reg","size":5,"offset":1,"chunkDigest":"sha256:` + strings.Repeat("z", 64) + `"}`, "invalid byte"},
		{"link to itself", `{"name":"a","type":"hardlink","linkName":"./a"}`, "itself"},
		{"link circle", `{"name":"a","type":"hardlink","linkName":"b"},{"name":"b","type":"hardlink","linkName":"c"},{"name":"c","type":"hardlink","linkName":"b"}`, "itself"},
		{"link escape", `{"name":"a","type":"hardlink","linkName":"../b"}`, "out of the layer"},
		{"link to the root", `{"name":"a","type":"hardlink","linkName":"/"}`, "hard link"},
		{"empty symlink", `{"name":"a","type":"symlink"}`, "target"},
		{"owner", `{"name":"a","type":"dir","uid":-1}`, "owner"},
		{"device", `{"name":"a","type":"char","devMajor":-1}`, "device number"},
		{"time", `{"name":"a","type":"dir","modtime":"yesterday"}`, "time"},
		{"xattr", `{"name":"a","type":"dir","xattrs":{"user.` + strings.Repeat("x", 300) + `":""}}`, "extended attribute"},
		{"wrong type", `{"name":5}`, "invalid JSON"},
		{"overflow", `{"name":"a","type":"reg","size":99999999999999999999}`, "out of range"},
		{"fraction", `{"name":"a","type":"reg","size":1.5}`, "invalid JSON"},
		{"leading zero", `{"name":"a","type":"reg","size":01}`, "no integer"},
		{"bad value", `{"name":"a","type":"dir","other":tru}`, "invalid value"},
		{"bad escape", `{"name":"a\x","type":"dir"}`, "invalid character"},
		{"nested", `{"name":"a","type":"dir","other":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + `}`, "too deep"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b, toc := pack(t, []byte(`{"version":1,"entries":[`+c.entries+`]}`), false)
			_, err := Open(t.Context(), b, b.desc(), toc)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), b.desc().Digest.String()) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
	for _, toc := range []string{``, `[]`, `{}`, `{"version":2,"entries":[]}`, `{"version":1}`, `{"version":1,"entries":{}}`, `{"version":1,"entries":[]`,
		`{"version":1,"entries":[]} x`, `{"version":1,"entries":[],"entries":[]}`, `{"version":1,"entries":[{}]}`} {
		b, d := pack(t, []byte(toc), false)
		if _, err := Open(t.Context(), b, b.desc(), d); !errdefs.IsInvalidArgument(err) {
			t.Errorf("TOC %s: %v", toc, err)
		}
	}
}

// checkInvariants holds for every layer that comes out of a TOC.
func checkInvariants(t *testing.T, l *index.Layer) {
	t.Helper()
	if len(l.Access.Pieces) != len(l.Table.Chunks) || l.Table.Size%index.BlockSize != 0 {
		t.Fatalf("%d pieces, %d chunks, %d bytes", len(l.Access.Pieces), len(l.Table.Chunks), l.Table.Size)
	}
	at := int64(0)
	for i, c := range l.Table.Chunks {
		p := l.Access.Pieces[i]
		if c.Off < at || c.Len <= 0 || c.Len > index.MaxChunk || c.End() > l.Table.Size {
			t.Fatalf("chunk %d: %+v behind %d", i, c, at)
		}
		if p.Off < 0 || p.Len <= 0 || p.Inner < 0 || p.Off+p.Len > l.BlobSize {
			t.Fatalf("piece %d: %+v", i, p)
		}
		at = c.End()
	}
	covered := int64(0)
	for _, e := range l.Entries {
		if e.Off%index.BlockSize != 0 || e.Size < 0 || e.Off < 0 || e.Off+e.Size > l.Table.Size || e.Nsec >= 1e9 {
			t.Fatalf("entry %+v in %d bytes", e, l.Table.Size)
		}
		covered += e.Size
	}
	for _, c := range l.Table.Chunks {
		covered -= c.Len
	}
	if covered != 0 {
		t.Fatalf("chunks and files differ by %d bytes", covered)
	}
}

func FuzzTOC(f *testing.F) {
	for _, opts := range [][]builder.Option{{builder.WithChunkSize(100_000)}, {builder.WithChunkSize(100_000), builder.WithMinChunkSize(200_000)}} {
		b, _ := convert(f, sample(f, 3), opts...)
		f.Add(tocOf(f, b), int64(len(b.data)))
	}
	f.Add([]byte(`{"version":1,"entries":[{"name":"a","type":"hardlink","linkName":"b"},{"name":"b","type":"hardlink","linkName":"a"}]}`), int64(100))
	f.Add([]byte(`{"version":1,"x":[{"a":[]},1e5,"\u00e9"],"entries":[{"name":"\u00e9\n\"é","type":"dir","xattrs":{"user.a":"AAE="},"userName":null,"size":-0}]}`), int64(100))
	f.Add([]byte(`{"version":1,"entries":[{"name":"f","type":"reg","size":10,"chunkSize":5,"offset":1,"chunkDigest":"`+sum+
		`"},{"name":"f","type":"chunk","offset":2,"chunkOffset":5,"chunkDigest":"`+sum+`"}]}`), int64(100))
	f.Fuzz(func(t *testing.T, toc []byte, end int64) {
		if end <= 0 {
			return
		}
		checkJSON(t, toc)
		l, err := parse(toc, layer.Descriptor{Size: end, Digest: sum}, end)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("error of another class: %v", err)
			}
			return
		}
		checkInvariants(t, l)
		if err := l.Validate(); err != nil && end < 1<<50 {
			t.Fatal(err)
		}
	})
}

// checkJSON holds that what is decoded is what encoding/json finds.
func checkJSON(t *testing.T, toc []byte) {
	t.Helper()
	var got []tocEntry
	if err := eachEntry(toc, func(e *tocEntry) error {
		got = append(got, *e)
		return nil
	}); err != nil {
		return
	}
	var want struct {
		Entries []map[string]json.RawMessage `json:"entries"`
	}
	if err := json.Unmarshal(toc, &want); err != nil {
		t.Fatalf("encoding/json says %v", err)
	}
	if len(want.Entries) != len(got) {
		return // the key in capitals, too
	}
	for i, e := range want.Entries {
		for key, value := range map[string]any{
			"name": got[i].Name, "type": string(got[i].Type), "modtime": string(got[i].ModTime), "size": got[i].Size,
			"offset": got[i].Offset, "chunkDigest": string(got[i].ChunkDigest), "linkName": got[i].LinkName,
		} {
			w := reflect.New(reflect.TypeOf(value))
			if raw, ok := e[key]; ok {
				if err := json.Unmarshal(raw, w.Interface()); err != nil {
					t.Fatalf("%s: encoding/json says %v", key, err)
				}
			}
			if w.Elem().Interface() != value {
				t.Fatalf("%s of entry %d is %v, want %v", key, i, value, w.Elem())
			}
		}
	}
}

// tocOf is the JSON in a blob.
func tocOf(f *testing.F, b *blob) []byte {
	f.Helper()
	footer, off, err := parseFooter(b.data)
	if err != nil {
		f.Fatal(err)
	}
	toc, err := unpackTOC(bytes.NewReader(b.data[off:b.Size()-footer]), b.Size())
	if err != nil {
		f.Fatal(err)
	}
	return toc
}

func BenchmarkParse(b *testing.B) {
	var toc struct {
		Version int              `json:"version"`
		Entries []map[string]any `json:"entries"`
	}
	toc.Version = 1
	for i := range 60_000 {
		toc.Entries = append(toc.Entries, map[string]any{
			"name": fmt.Sprintf("usr/share/doc/package-%d/file", i), "type": "reg", "size": 1000, "offset": i + 1, "mode": 420,
			"modtime": "2026-01-02T03:04:05Z", "digest": sum, "chunkDigest": sum,
		})
	}
	data, err := json.MarshalIndent(toc, "", "\t")
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parse(data, layer.Descriptor{Size: 1 << 30}, 1<<30); err != nil {
			b.Fatal(err)
		}
	}
}
