package profile

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
)

func encode(t testing.TB, p *Profile) []byte {
	t.Helper()
	data, err := Encode(p)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestCodec(t *testing.T) {
	p := merged(ats(3, 1, 2), ats(1, 9))
	p.Add([]Range{{digest.FromString("other"), 5, 7}}, maxBytes, false)
	p.Entrypoint, p.Command = Key([]string{"/bin/sh"}), "/bin/sh"
	got, err := Decode(encode(t, p))
	if err != nil || !reflect.DeepEqual(got, p) {
		t.Errorf("%+v, %v, want %+v", got, err, p)
	}
}

// The largest profile has room.
func TestCodecLargest(t *testing.T) {
	p := &Profile{Source: Recorded}
	var run []Range
	for k := range MaxParts {
		run = append(run, Range{digest.FromString(string(rune('a' + k%128))), 1<<40 + int64(k)<<16, 1 << 13})
	}
	p.Add(run, maxBytes, false)
	data := encode(t, p)
	if got, err := Decode(data); err != nil || len(got.Parts) != MaxParts || len(data) > MaxEncoded {
		t.Errorf("%d bytes: %v", len(data), err)
	}
}

// Damage is an error that names it, or a profile within bounds.
func TestDecodeRefuses(t *testing.T) {
	const head = `{"version":1,"source":"recorded","runs":1,"segments":["` + "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" + `"],"parts":[`
	for text, want := range map[string]string{
		"":                           "unexpected end",
		"{":                          "unexpected end",
		"[]":                         "cannot unmarshal",
		`{"version":2}`:              "version 2",
		`{"version":1}`:              "source",
		`{"version":1,"source":"x"}`: `source "x"`,
		`{"version":1,"source":"recorded","runs":-1}`:                     "-1 runs",
		`{"version":1,"source":"recorded","entrypoint":"../x"}`:           "entrypoint",
		`{"version":1,"source":"recorded","command":"a\u001bb"}`:          "command",
		`{"version":1,"source":"recorded","segments":["sha256:x"]}`:       "segment",
		head + `[1,0,1,1,0]]}`:                                            "segment 1 of 1",
		head + `[-1,0,1,1,0]]}`:                                           "segment -1 of 1",
		head + `[0,-1,1,1,0]]}`:                                           "1 bytes at -1",
		head + `[0,9223372036854775807,1,1,0]]}`:                          "1 bytes at 9223372036854775807",
		head + `[0,0,16777217,1,0]]}`:                                     "16777217 bytes at 0",
		head + `[0,0,1,0,0]]}`:                                            "seen 0x0",
		head + `[0,0,1,256,0]]}`:                                          "seen 0x100",
		head + `[0,0,1,1,4294967296]]}`:                                   "at 4294967296",
		head + `[0,0,1,1,0],[0,0,2,1,0]]}`:                                "twice",
		head + strings.Repeat(`[0,0,1,1,0],`, MaxParts) + `[0,0,1,1,0]]}`: "8193 parts",
		strings.Repeat(" ", MaxEncoded+1):                                 "are over",
	} {
		p, err := Decode([]byte(text))
		if p != nil || !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s: %+v, %v, want %q", text, p, err, want)
		}
	}
	data := encode(t, merged(ats(1, 2, 3)))
	for i := range data {
		if _, err := Decode(data[:i]); !errdefs.IsDataLoss(err) {
			t.Errorf("cut at %d: %v", i, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode(f, merged(ats(3, 1, 2), ats(1, 9))))
	f.Add(encode(f, &Profile{Source: Imported, Runs: 1}))
	f.Add([]byte(`{"version":1,"source":"recorded","runs":1,"segments":["sha256:x"],"parts":[[0,0,1,1,0]]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Decode(data)
		if err != nil {
			if !errdefs.IsDataLoss(err) {
				t.Fatal(err)
			}
			return
		}
		p.Add(ats(1, 2), maxBytes, false)
		if again, err := Decode(encode(t, p)); err != nil || !reflect.DeepEqual(again, p) {
			t.Fatalf("%+v, %v, want %+v", again, err, p)
		}
	})
}

func TestArtifact(t *testing.T) {
	image := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("image"), Size: 5}
	r, p := artifact.Describe(RangesType, []byte("ranges")), artifact.Describe(PathsType, []byte("paths"))
	desc, data, err := Artifact(image, r, p)
	if err != nil || desc.Digest != digest.FromBytes(data) || desc.ArtifactType != ArtifactType {
		t.Fatalf("%+v, %v", desc, err)
	}
	ranges, paths, err := Files(data, image.Digest)
	if err != nil || ranges.Digest != r.Digest || paths.Digest != p.Digest {
		t.Errorf("%+v, %+v, %v", ranges, paths, err)
	}
	large := r
	large.Size = MaxEncoded + 1
	_, tooLarge, err := Artifact(image, large, p)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		data  []byte
		image digest.Digest
	}{
		"no JSON":       {[]byte("{"), image.Digest},
		"another image": {data, r.Digest},
		"too large":     {tooLarge, image.Digest},
		"another type":  {bytes.ReplaceAll(data, []byte(ArtifactType), []byte("x")), image.Digest},
		"bad digest":    {bytes.ReplaceAll(data, []byte(r.Digest), []byte("sha256:x")), image.Digest},
		"negative size": {bytes.ReplaceAll(data, []byte(`"size":6`), []byte(`"size":-6`)), image.Digest},
	} {
		if _, _, err := Files(tc.data, tc.image); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
