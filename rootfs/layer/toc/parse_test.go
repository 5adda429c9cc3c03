package toc

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	builder "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tests/torture"
)

const sum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// parse reads a TOC at byte 1000 of a blob.
func parse(json []byte) (*index.Layer, error) {
	return Parse(json, layer.Descriptor{Digest: sum, Size: 1100}, 1000, Format{Codec: index.ZstdFrame, Marked: true})
}

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
		{"ends before its chunk", reg(`"size":5,"offset":9,"endOffset":9`), "ends at byte 9"},
		{"ends in the TOC", reg(`"size":5,"offset":9,"endOffset":1001`), "ends at byte 1001"},
		{"ends before zero", reg(`"size":5,"offset":9,"endOffset":-1`), "ends at byte -1"},
		{"next file in the last one's chunk", reg(`"size":5,"offset":9,"endOffset":20`) + "," + reg(`"size":5,"offset":19`), "overlaps"},
		{"unknown chunk", reg(`"size":5,"offset":9,"chunkType":"ones"`), "unknown type of chunk"},
		{"zeros out of the blob", reg(`"size":5,"offset":1000,"chunkType":"zeros"`), "chunk at byte 1000"},
		{"zeros behind the end", reg(`"size":5,"offset":9,"chunkSize":6,"chunkType":"zeros"`), "does not follow"},
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
			_, err := parse([]byte(`{"version":1,"entries":[` + c.entries + `]}`))
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
	for _, json := range []string{``, `[]`, `{}`, `{"version":2,"entries":[]}`, `{"version":1}`, `{"version":1,"entries":{}}`, `{"version":1,"entries":[]`,
		`{"version":1,"entries":[]} x`, `{"version":1,"entries":[],"entries":[]}`, `{"version":1,"entries":[{}]}`} {
		if _, err := parse([]byte(json)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("TOC %s: %v", json, err)
		}
	}
}

func TestParseNothing(t *testing.T) {
	for _, json := range []string{`{"version":1,"entries":[]}`, `{"version":1,"entries":null}`, `{"version":1,"entries": null,"tarSplitDigest":"` + sum + `"}`} {
		if l, err := parse([]byte(json)); err != nil || len(l.Entries) != 0 || l.Table.Size != 0 {
			t.Errorf("TOC %s: %+v, %v", json, l, err)
		}
	}
}

// samples are TOCs that no builder at hand makes, or that are small.
var samples = []string{
	`{"version":1,"entries":[{"name":"a","type":"hardlink","linkName":"b"},{"name":"b","type":"hardlink","linkName":"a"}]}`,
	`{"version":1,"x":[{"a":[]},1e5,"\u00e9"],"entries":[{"name":"\u00e9\n\"é","type":"dir","xattrs":{"user.a":"AAE="},"userName":null,"size":-0}]}`,
	`{"version":1,"entries":[{"name":"f","type":"reg","size":10,"chunkSize":5,"offset":1,"chunkDigest":"` + sum +
		`"},{"name":"f","type":"chunk","offset":2,"chunkOffset":5,"chunkDigest":"` + sum + `"}]}`,
	zerosTOC,
}

// zerosTOC is laid out as podman's are: data, zeros, data, then a file with one
// chunk.
const zerosTOC = `{"version":1,"entries":[{"type":"reg","name":"f","mode":420,"size":70005,"modtime":"2023-11-14T22:13:20.123456789Z","digest":"` + sum +
	`","offset":10,"endOffset":90,"chunkSize":5,"chunkDigest":"` + sum + `"},` +
	`{"type":"chunk","name":"f","offset":30,"chunkSize":60000,"chunkOffset":5,"chunkDigest":"` + sum + `","chunkType":"zeros"},` +
	`{"type":"chunk","name":"f","offset":50,"chunkSize":10000,"chunkOffset":60005,"chunkDigest":"` + sum + `"},` +
	`{"type":"reg","name":"g","size":3,"digest":"` + sum + `","offset":120,"endOffset":130}],"tarSplitDigest":"` + sum + `"}`

func TestParseZeros(t *testing.T) {
	l, err := parse([]byte(zerosTOC))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i, c := range l.Table.Chunks {
		p := l.Access.Pieces[i]
		got = append(got, fmt.Sprintf("%d+%d: %d+%d", c.Off, c.Len, p.Off, p.Len))
	}
	want := []string{"0+5: 10+20", "60005+10000: 50+40", "73728+3: 120+10"}
	if !slices.Equal(got, want) || l.Table.Size != 77824 || l.Entries[0].Nsec != 123456789 {
		t.Errorf("chunks %q, want %q; %d bytes, %+v", got, want, l.Table.Size, l.Entries)
	}
}

// TestParseLargeZeros has a file of zeros as one chunk, which is over the limit
// of chunks but needs none, and too many of them to be looked at.
func TestParseLargeZeros(t *testing.T) {
	const n = index.MaxChunk + 1
	zeros := digest.FromBytes(make([]byte, n))
	file := func(sum digest.Digest) string {
		return fmt.Sprintf(`{"name":"f","type":"reg","size":%d,"offset":9,"endOffset":10,"digest":"%s"}`, n, sum)
	}
	l, err := parse([]byte(`{"version":1,"entries":[` + file(zeros) + `]}`))
	if err != nil || len(l.Table.Chunks) != 0 || l.Entries[0].Size != n {
		t.Errorf("%+v, %v", l, err)
	}
	if _, err := parse([]byte(`{"version":1,"entries":[` + file(digest.FromString("x")) + `]}`)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("not zeros: %v", err)
	}
	p := parser{zeros: maxZeros - n + 1}
	if err := p.large(zeroSum(n), n); err == nil {
		t.Error("no bound on zeros")
	}
}

func TestLandmarks(t *testing.T) {
	file := func(name string, off int) string {
		return fmt.Sprintf(`{"name":"%s","type":"reg","size":5000,"offset":%d,"digest":"%s"}`, name, off, sum)
	}
	cases := []struct {
		name    string
		entries []string
		marked  bool
		want    []index.Range
		kept    int
	}{
		{"none", []string{file("a", 1)}, true, nil, 1},
		{"prefetch", []string{file("a", 1), file("b", 2), file("./.prefetch.landmark", 3), file("c", 4)}, true, []index.Range{{Len: 16384}}, 3},
		{"first", []string{file(".prefetch.landmark", 3), file("c", 4)}, true, nil, 1},
		{"no", []string{file("a", 1), file(".no.prefetch.landmark", 2)}, true, nil, 1},
		{"both", []string{file("a", 1), file(".prefetch.landmark", 2), file(".no.prefetch.landmark", 3)}, true, nil, 1},
		{"elsewhere", []string{file("a", 1), file("x/.prefetch.landmark", 2)}, true, nil, 2},
		{"not marked", []string{file("a", 1), file(".prefetch.landmark", 2), file("stargz.index.json", 3)}, false, nil, 3},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l, err := Parse([]byte(`{"version":1,"entries":[`+strings.Join(c.entries, ",")+`]}`),
				layer.Descriptor{Digest: sum, Size: 1100}, 1000, Format{Codec: index.GzipMember, Marked: c.marked})
			if err != nil || !slices.Equal(l.Prefetch, c.want) || len(l.Entries) != c.kept {
				t.Errorf("%+v, %v", l, err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	w := torture.NewTar()
	w.Dir("d", torture.Own(1, 2), torture.Attr("user.a", "\xff"))
	w.Random("d/chunks", 3000)
	w.Random("d/\u00fc", 10)
	w.Link("hard", "d/chunks")
	w.Device(tar.TypeChar, "null", 1, 3)
	w.File("d/.wh.x", "")
	plain := w.Bytes()
	for _, opts := range [][]builder.Option{{builder.WithChunkSize(1000)}, {builder.WithChunkSize(1000), builder.WithMinChunkSize(2000)}} {
		f.Add(build(f, plain, opts...), int64(1<<30), false)
	}
	for _, json := range samples {
		f.Add([]byte(json), int64(1000), true)
	}
	f.Fuzz(func(t *testing.T, json []byte, end int64, marked bool) {
		if end <= 0 {
			return
		}
		checkJSON(t, json)
		l, err := Parse(json, layer.Descriptor{Size: end, Digest: sum}, end, Format{index.ZstdFrame, marked})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("error of another class: %v", err)
			}
			return
		}
		if err := l.Validate(); err != nil && end < 1<<50 {
			t.Fatal(err)
		}
		checkCovered(t, l)
	})
}

// checkCovered holds that files have at least the bytes that chunks have.
func checkCovered(t *testing.T, l *index.Layer) {
	t.Helper()
	total := int64(0)
	for _, e := range l.Entries {
		total += e.Size
	}
	for _, c := range l.Table.Chunks {
		total -= c.Len
	}
	if total < 0 {
		t.Fatalf("chunks have %d bytes more than files", -total)
	}
}

// checkJSON holds that what is decoded is what encoding/json finds.
func checkJSON(t *testing.T, toc []byte) {
	t.Helper()
	var got []entry
	if err := eachEntry(toc, func(e *entry) error {
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
			"offset": got[i].Offset, "endOffset": got[i].EndOffset, "chunkType": string(got[i].ChunkType), "chunkDigest": string(got[i].ChunkDigest), "linkName": got[i].LinkName,
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

// build is the JSON that the eStargz library makes for a tar.
func build(tb testing.TB, plain []byte, opts ...builder.Option) []byte {
	tb.Helper()
	made, err := builder.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), opts...)
	if err != nil {
		tb.Fatal(err)
	}
	data, err := io.ReadAll(made)
	if err := errors.Join(err, made.Close()); err != nil {
		tb.Fatal(err)
	}
	var z builder.GzipDecompressor
	_, off, _, err := z.ParseFooter(data[int64(len(data))-z.FooterSize():])
	if err != nil {
		tb.Fatal(err)
	}
	r, err := z.DecompressTOC(bytes.NewReader(data[off:]))
	if err != nil {
		tb.Fatal(err)
	}
	json, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		tb.Fatal(err)
	}
	return json
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
		if _, err := Parse(data, layer.Descriptor{Size: 1 << 30}, 1<<30, Format{Codec: index.GzipMember}); err != nil {
			b.Fatal(err)
		}
	}
}
