package volume

import (
	"encoding/base64"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

var (
	root = strings.Repeat("0a", 32)
	one  = uint32(1)
)

// golden records as Kata's runtimes read them: field names and types are those
// of KataVirtualVolume in src/runtime/virtcontainers/types/virtual_volume.go:56
// and src/libs/kata-types/src/mount.rs:301 (kata-containers 7c6ba40c54ea).
var golden = []struct {
	text   string
	volume *Volume
}{
	{
		`{"volume_type":"image_guest_pull","source":"docker.io/library/busybox:1","image_pull":{"metadata":{}}}`,
		NewGuestPull("docker.io/library/busybox:1"),
	},
	{
		`{"volume_type":"image_guest_pull","source":"r","options":["a=b"],"image_pull":{"metadata":{"k":"v"}}}`,
		&Volume{Type: GuestPull, Source: "r", Options: []string{"a=b"}, ImagePull: &Metadata{map[string]string{"k": "v"}}},
	},
	{
		`{"volume_type":"direct_block","source":"/dev/sdb","fs_type":"ext4","options":["ro"],"direct_volume":{"metadata":{"fsGroup":"7"}}}`,
		&Volume{Type: DirectBlock, Source: "/dev/sdb", FSType: "ext4", Options: []string{"ro"}, Direct: &Metadata{map[string]string{"fsGroup": "7"}}},
	},
	{
		`{"volume_type":"image_raw_block","source":"/a.erofs","fs_type":"erofs","dm_verity":{"hashtype":"sha256","hash":"` + root +
			`","blocknum":8,"blocksize":512,"hashsize":4096,"offset":4096,"salt":"00ff","hash_type":1,"no_superblock":true}}`,
		&Volume{Type: ImageRawBlock, Source: "/a.erofs", FSType: "erofs", Verity: &Verity{
			Algorithm: "sha256", RootHash: root, DataBlocks: 8, DataBlockSize: 512, HashBlockSize: 4096, Offset: 4096,
			Salt: "00ff", Format: &one, NoSuperblock: true}},
	},
	{
		`{"volume_type":"layer_raw_block","source":"/a","fs_type":"ext4","dm_verity":{"hashtype":"SHA1","hash":"` + root[:40] +
			`","blocknum":1,"blocksize":512,"hashsize":512,"offset":512}}`,
		&Volume{Type: LayerRawBlock, Source: "/a", FSType: "ext4", Verity: &Verity{
			Algorithm: "SHA1", RootHash: root[:40], DataBlocks: 1, DataBlockSize: 512, HashBlockSize: 512, Offset: 512}},
	},
	{
		`{"volume_type":"image_nydus_block","source":"/meta","fs_type":"rafsv6","nydus_image":{"config":"{}","snapshot_dir":"/s"}}`,
		&Volume{Type: ImageNydusBlock, Source: "/meta", FSType: "rafsv6", Nydus: &NydusImage{"{}", "/s"}},
	},
	{
		`{"volume_type":"layer_nydus_block","source":"/meta","fs_type":"rafsv6","nydus_image":{"config":"{}","snapshot_dir":"/s"}}`,
		&Volume{Type: LayerNydusBlock, Source: "/meta", FSType: "rafsv6", Nydus: &NydusImage{"{}", "/s"}},
	},
	{
		`{"volume_type":"image_nydus_fs","source":"/meta","fs_type":"rafsv5","nydus_image":{"config":"{}","snapshot_dir":"/s"}}`,
		&Volume{Type: ImageNydusFS, Source: "/meta", FSType: "rafsv5", Nydus: &NydusImage{"{}", "/s"}},
	},
	{
		`{"volume_type":"layer_nydus_fs","source":"/meta","fs_type":"rafsv6","nydus_image":{"config":"{}","snapshot_dir":"/s"}}`,
		&Volume{Type: LayerNydusFS, Source: "/meta", FSType: "rafsv6", Nydus: &NydusImage{"{}", "/s"}},
	},
}

func option(text string) string { return Prefix + base64.StdEncoding.EncodeToString([]byte(text)) }

func TestGolden(t *testing.T) {
	for _, g := range golden {
		got, err := g.volume.Option()
		if err != nil || got != option(g.text) {
			t.Errorf("%s: option %s, %v", g.text, got, err)
		}
		back, err := Decode(option(g.text))
		if err != nil || !reflect.DeepEqual(back, g.volume) {
			t.Errorf("%s: decoded %+v, %v", g.text, back, err)
		}
	}
	if len(golden) != len(kinds)+1 {
		t.Errorf("%d records for %d types", len(golden), len(kinds))
	}
}

// A record of a newer Kata has fields that this one does not know.
func TestUnknownField(t *testing.T) {
	v, err := Decode(option(`{"volume_type":"image_guest_pull","source":"r","image_pull":{"metadata":{}},"new":[1]}`))
	if err != nil || v.Source != "r" {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestRefused(t *testing.T) {
	verity := func(fields string) string {
		return `{"volume_type":"image_raw_block","source":"/a","fs_type":"erofs","dm_verity":{` + fields + `}}`
	}
	const tail = `,"hash":"` + "0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a" + `"`
	for text, reason := range map[string]string{
		``:                               "EOF",
		`{`:                              "unexpected EOF",
		`[]`:                             "cannot unmarshal",
		`{} {}`:                          "more text",
		`{}`:                             "unknown type",
		`{"volume_type":"ignore"}`:       "unknown type",
		`{"volume_type":"direct_block"}`: "no path in source",
		`{"volume_type":"image_guest_pull","image_pull":{"metadata":{}}}`:                                "no image reference",
		`{"volume_type":"image_guest_pull","source":"r"}`:                                                "no image_pull",
		`{"volume_type":"image_guest_pull","source":"r","image_pull":{}}`:                                "no metadata in image_pull",
		`{"volume_type":"image_guest_pull","source":"a\u0000b","image_pull":{"metadata":{}}}`:            "is not a text",
		`{"volume_type":"direct_block","source":"/a"}`:                                                   "no fs_type",
		`{"volume_type":"direct_block","source":"/a","fs_type":"ext4","direct_volume":{}}`:               "no metadata in direct_volume",
		`{"volume_type":"direct_block","source":"/a","fs_type":"ext4","nydus_image":{}}`:                 "nothing in nydus_image",
		`{"volume_type":"layer_raw_block","source":"/a"}`:                                                "no fs_type",
		`{"volume_type":"image_nydus_block","source":"/a","fs_type":"rafsv5"}`:                           "want rafsv6",
		`{"volume_type":"image_nydus_fs","source":"/a","fs_type":"erofs"}`:                               "want rafsv5 or rafsv6",
		`{"volume_type":"image_nydus_fs","source":"/a","fs_type":"rafsv6"}`:                              "nydus_image",
		`{"volume_type":"layer_nydus_fs","source":"/a","fs_type":"rafsv6","nydus_image":{"config":"c"}}`: "snapshot_dir",
		verity(`"hashtype":"md5"`):                                                                                  "want sha256",
		verity(`"hashtype":"sha256","hash":"0a"`):                                                                   "in hex",
		verity(`"hashtype":"sha256"` + tail):                                                                        "blocknum 0",
		verity(`"hashtype":"sha256","blocknum":4294967296` + tail):                                                  "blocknum",
		verity(`"hashtype":"sha256","blocknum":1` + tail):                                                           "blocksize 0",
		verity(`"hashtype":"sha256","blocknum":1,"blocksize":512,"hashsize":1048576` + tail):                        "hashsize",
		verity(`"hashtype":"sha256","blocknum":2,"blocksize":512,"hashsize":512,"offset":512` + tail):               "offset",
		verity(`"hashtype":"sha256","blocknum":1,"blocksize":512,"hashsize":512,"offset":700` + tail):               "offset",
		verity(`"hashtype":"sha256","blocknum":1,"blocksize":512,"hashsize":512,"offset":512,"salt":"zz"` + tail):   "salt",
		verity(`"hashtype":"sha256","blocknum":1,"blocksize":512,"hashsize":512,"offset":512,"hash_type":2` + tail): "hash_type 2",
		verity(`"hashtype":"sha256","blocknum":-1` + tail):                                                          "cannot unmarshal",
	} {
		_, err := Decode(option(text))
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%s: %v, want %q", text, err, reason)
		}
	}
}

func TestNoOption(t *testing.T) {
	good := option(golden[0].text)
	for o, want := range map[string]func(error) bool{
		"ro":                                    errdefs.IsNotFound,
		Prefix + "%":                            errdefs.IsInvalidArgument,
		good + "\n":                             errdefs.IsInvalidArgument,
		strings.TrimRight(good, "=") + "=":      errdefs.IsInvalidArgument,
		Prefix + strings.Repeat("A", maxOption): errdefs.IsInvalidArgument,
	} {
		if v, err := Decode(o); !want(err) {
			t.Errorf("%.60q: %+v, %v", o, v, err)
		}
	}
	for _, v := range []*Volume{{}, NewGuestPull(""), NewGuestPull("\xff"), NewGuestPull(strings.Repeat("r", maxOption))} {
		if o, err := v.Option(); !errdefs.IsInvalidArgument(err) || o != "" {
			t.Errorf("%.60q: %v", o, err)
		}
	}
}

func TestFind(t *testing.T) {
	good := option(golden[0].text)
	if v, err := Find([]string{"lowerdir=/a", good}); err != nil || v.Type != GuestPull {
		t.Errorf("%+v, %v", v, err)
	}
	if _, err := Find([]string{"lowerdir=/a"}); !errdefs.IsNotFound(err) {
		t.Errorf("none: %v", err)
	}
	if _, err := Find([]string{good, "ro", good}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("two: %v", err)
	}
}

// What is decoded is valid, and says the same when it is encoded again.
func FuzzDecode(f *testing.F) {
	for _, g := range golden {
		f.Add([]byte(g.text))
	}
	f.Add([]byte(`{"volume_type":"image_guest_pull","source":"\ud800","image_pull":{"metadata":null}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		v, err := Decode(option(string(text)))
		if err != nil {
			return
		}
		again, err := v.Option()
		if err != nil {
			t.Fatalf("%+v: %v", v, err)
		}
		back, err := Decode(again)
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		if third, err := back.Option(); err != nil || third != again {
			t.Fatalf("%s: %v, want %s", third, err, again)
		}
	})
}

// Any text is an answer or an error.
func FuzzOption(f *testing.F) {
	f.Add(option(golden[0].text))
	f.Add(Prefix + "====")
	f.Fuzz(func(t *testing.T, o string) {
		if v, err := Decode(o); err == nil && v.Validate() != nil {
			t.Fatalf("%+v is not valid", v)
		}
	})
}
