package bundle

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	passwd = "root:x:0:0::/root:/bin/sh\nshort\nwww:x:33:44::/:\nbad:x:y:z::/:\nseven:x:7:70::/:\n"
	group  = "root:x:0:\nwww:x:44:\nextra:x:50:www,root\nmore:x:51:www\nbad:x:q:www\n"
)

func imageWith(t *testing.T, passwd, group string) string {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"passwd": passwd, "group": group} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestLookUpUser(t *testing.T) {
	root := imageWith(t, passwd, group)
	cases := []struct {
		name    string
		want    specs.User
		wantErr string
	}{
		{name: "www", want: specs.User{UID: 33, GID: 44, AdditionalGids: []uint32{50, 51}}},
		{name: "www:extra", want: specs.User{UID: 33, GID: 50}},
		{name: "www:9", want: specs.User{UID: 33, GID: 9}},
		{name: "33", want: specs.User{UID: 33, GID: 44, AdditionalGids: []uint32{50, 51}}},
		{name: "1234", want: specs.User{UID: 1234}},
		{name: "seven:www", want: specs.User{UID: 7, GID: 44}},
		{name: "bad", wantErr: `user "bad"`},
		{name: "nobody", wantErr: `user "nobody"`},
		{name: "www:nogroup", wantErr: `group "nogroup"`},
		{name: "-1", wantErr: `user "-1"`},
		{name: "4294967295", wantErr: "user"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := lookUpUser(root, c.name)
			if c.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), c.wantErr) {
					t.Fatalf("error %v, want %q", err, c.wantErr)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v, %v; want %+v", got, err, c.want)
			}
		})
	}
}

func TestUserFilesDoNotLeadOutOfTheImage(t *testing.T) {
	root := imageWith(t, "", "")
	outside := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(outside, []byte("evil:x:0:0::/:\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	inside := filepath.Join(root, "etc", "passwd")
	for name, replace := range map[string]func() error{
		"link out": func() error { return os.Symlink(outside, inside) },
		"dots":     func() error { return os.Symlink("../../../../../.."+outside, inside) },
		"fifo":     func() error { return unix.Mkfifo(inside, 0o600) },
		"dir":      func() error { return os.Mkdir(inside, 0o700) },
	} {
		if err := os.Remove(inside); err != nil {
			t.Fatal(err)
		}
		if err := replace(); err != nil {
			t.Fatal(err)
		}
		if u, err := lookUpUser(root, "evil"); err == nil {
			t.Errorf("%s: found %+v", name, u)
		}
	}
}

func TestPrepare(t *testing.T) {
	root := imageWith(t, passwd, group)
	cases := []struct{ name, config, root, wantErr string }{
		{name: "good", config: `{"root":{"path":"x","readonly":true},"process":{"args":["a"]},"annotations":{"dev.tatami.image.user":"www"}}`, root: root},
		{name: "no json", config: `{`, root: root, wantErr: "decode"},
		{name: "no command", config: `{}`, root: root, wantErr: "no command"},
		{name: "terminal", config: `{"process":{"args":["a"],"terminal":true}}`, root: root, wantErr: "terminal"},
		{name: "relative", config: `{"process":{"args":["a"]}}`, root: "rootfs", wantErr: "absolute"},
		{name: "unknown user", config: `{"process":{"args":["a"]},"annotations":{"dev.tatami.image.user":"eve"}}`, root: root, wantErr: `"eve"`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b, err := Prepare([]byte(c.config), c.root)
			if c.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), c.wantErr) {
					t.Fatalf("error %v, want %q", err, c.wantErr)
				}
				return
			}
			var got specs.Spec
			if err != nil || json.Unmarshal(b, &got) != nil {
				t.Fatalf("%v: %s", err, b)
			}
			if got.Root.Path != root || !got.Root.Readonly || got.Process.User.UID != 33 || *got.Process.OOMScoreAdj != 0 {
				t.Errorf("got %s", b)
			}
		})
	}
}
