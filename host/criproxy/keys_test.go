package criproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

func password(p string) *key { return &key{cred: auth.Credential{Username: "u", Password: p}} }

func (k *Keys) ask(t *testing.T, repository string, refused bool) string {
	t.Helper()
	cred, err := k.Credential(registry.WithLookup(t.Context(), &registry.Lookup{Repository: repository, Refused: refused}), "r.example")
	check(t, err)
	return cred.Password
}

// What a registry refuses gives way to the next one, and to other sources when none
// is left. After that it is tried again, and a new pull makes it count at once.
func TestRefused(t *testing.T) {
	k := NewKeys(nil, slog.New(slog.DiscardHandler))
	const repo = "r.example/x"
	k.begin(repo, password("old"))(nil)
	k.begin(repo, password("new"))(nil)
	for i, step := range []struct {
		refused bool
		want    string
	}{{false, "new"}, {false, "new"}, {true, "old"}, {false, "old"}, {true, ""}, {false, "new"}, {true, ""}, {false, "old"}} {
		if got := k.ask(t, repo, step.refused); got != step.want {
			t.Errorf("step %d: %q, want %q", i, got, step.want)
		}
	}
	k.begin(repo, password("old"))(nil)
	if got := k.ask(t, repo, false); got != "old" {
		t.Errorf("%q after another pull", got)
	}
}

func TestBounds(t *testing.T) {
	k := NewKeys(nil, slog.New(slog.DiscardHandler))
	end := k.begin("r.example/held", password("held"))
	for i := range 2 * maxRepositories {
		k.begin(fmt.Sprintf("r.example/%d", i), password("p"))(nil)
	}
	if n := len(k.known); n > maxRepositories || n < maxRepositories/2 || k.ask(t, "r.example/held", false) != "held" || k.ask(t, "r.example/0", false) != "" {
		t.Errorf("%d repositories are known", n)
	}
	end(errors.New("failed"))
	for i := range 3 * maxEach {
		k.begin("r.example/many", password(fmt.Sprint(i)))(nil)
	}
	if n := len(k.known["r.example/many"].keys); n != maxEach {
		t.Errorf("%d credentials of one repository", n)
	}
	for i := range maxBytes / maxKey * 2 {
		k.begin(fmt.Sprintf("r.example/large%d", i), password(strings.Repeat("x", maxKey-10)))(nil)
	}
	total := 0
	for _, e := range k.known {
		total += e.size()
	}
	if total > maxBytes || total < maxBytes/2 {
		t.Errorf("%d bytes are kept", total)
	}
	k.begin("r.example/huge", password(strings.Repeat("x", maxKey)))(nil)
	if k.ask(t, "r.example/huge", false) != "" {
		t.Error("a credential of any size is kept")
	}
}

// reopen is the memory as the next process has it.
func reopen(t *testing.T, f *os.File) *Memory {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	check(t, err)
	m := OpenMemory(os.NewFile(uintptr(fd), "memory"))
	t.Cleanup(func() { check(t, m.Close()) })
	return m
}

// The next process knows what the last one knew, however that ended.
func TestMemory(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	f, err := NewMemory()
	check(t, err)
	defer f.Close()
	k := NewKeys(reopen(t, f), log)
	k.begin("r.example/x", password("one"))(nil)
	k.begin("r.example/x", password("two"))(nil)
	k.begin("r.example/y", &key{server: "r.example", cred: auth.Credential{RefreshToken: "token"}})(nil)
	k.begin("r.example/z", password("wrong"))(errors.New("refused"))
	k.begin("r.example/running", password("unproven")) // and then the process is killed
	next := NewKeys(reopen(t, f), log)
	if got := next.list("r.example/x", "any"); len(got) != 2 || got[0].Password != "two" || got[1].Password != "one" {
		t.Errorf("%d credentials of x", len(got))
	}
	if got := next.list("r.example/y", "r.example"); len(got) != 1 || got[0].RefreshToken != "token" || len(next.known) != 2 {
		t.Errorf("%d credentials of y, %d repositories", len(got), len(next.known))
	}
	at, _ := next.now()
	next.retain(map[string]bool{"r.example/y": true}, at)
	last := NewKeys(reopen(t, f), log)
	if len(last.known) != 1 || last.known["r.example/y"] == nil {
		t.Errorf("%d repositories are known after one was forgotten", len(last.known))
	}
	if b := content(t, f); strings.Contains(b, "two") {
		t.Error("what was forgotten is still in memory")
	}
}

// What is pulled while containerd's images are listed is not in the list, and stays.
func TestRetainPulledMeanwhile(t *testing.T) {
	k := NewKeys(nil, slog.New(slog.DiscardHandler))
	k.begin("r.example/before", password("one"))(nil)
	at, ok := k.now()
	k.begin("r.example/meanwhile", password("two"))(nil)
	k.retain(map[string]bool{}, at)
	if got := k.list("r.example/meanwhile", "any"); !ok || len(got) != 1 || len(k.known) != 1 {
		t.Errorf("%d credentials, %d repositories", len(got), len(k.known))
	}
}

func content(t *testing.T, f *os.File) string {
	t.Helper()
	b := make([]byte, 1<<16)
	var all strings.Builder
	for _, at := range []int64{0, slotSize} {
		n, _ := f.ReadAt(b, at) // an end is none
		all.Write(b[:n])
	}
	return all.String()
}

// A process that is killed while it writes leaves what was there before.
func TestMemoryTorn(t *testing.T) {
	f, err := NewMemory()
	check(t, err)
	defer f.Close()
	m := reopen(t, f)
	want := []saved{{Repository: "r.example/x", Credential: auth.Credential{Username: "u"}}}
	check(t, m.store(want))
	slot := int64((m.generation + 1) % 2)
	for _, torn := range []func() error{
		func() error { _, err := f.WriteAt([]byte("half"), slot*slotSize+headerSize); return err },
		func() error { return m.write(slot, 9, []byte("no JSON")) },
		func() error { _, err := f.WriteAt([]byte("header"), slot*slotSize); return err },
	} {
		check(t, torn())
		if got := reopen(t, f).load(); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v", got)
		}
	}
}

// FuzzMemory reads whatever may be in such a file.
func FuzzMemory(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 100))
	dir := f.TempDir()
	seed, err := os.Create(filepath.Join(dir, "seed"))
	if err != nil {
		f.Fatal(err)
	}
	m := OpenMemory(seed)
	if err := m.write(0, 1, []byte(`[{"Repository":"r.example/x","Credential":{"Username":"u"}}]`)); err != nil {
		f.Fatal(err)
	}
	written, err := os.ReadFile(seed.Name())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(written)
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := NewMemory()
		check(t, err)
		defer file.Close()
		_, err = file.Write(b)
		check(t, err)
		k := NewKeys(OpenMemory(file), slog.New(slog.DiscardHandler))
		for name := range k.known {
			if _, err := k.Credential(registry.WithLookup(context.Background(), &registry.Lookup{Repository: name}), "h"); err != nil {
				t.Error(err)
			}
		}
	})
}
