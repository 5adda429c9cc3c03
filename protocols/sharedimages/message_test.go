package sharedimages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func packet(h Header, payload []byte) []byte {
	var head [headerLen]byte
	h.put(&head)
	return append(head[:], payload...)
}

func TestDecode(t *testing.T) {
	want := Header{Op: Read, Status: 3, ID: 1 << 31, Handle: 7, N: MaxData, Off: 1 << 40}
	data := bytes.Repeat([]byte("x"), MaxData)
	h, payload, err := Decode(packet(want, data))
	if err != nil || h != want || !bytes.Equal(payload, data) {
		t.Errorf("%+v with %d bytes, %v", h, len(payload), err)
	}
	// The layout, which other versions rely on.
	golden := []byte{4, 0, 3, 0, 0, 0, 0, 128, 7, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0}
	if got := packet(want, nil); !bytes.Equal(got, golden) {
		t.Errorf("header %v", got)
	}
	for name, bad := range map[string][]byte{
		"empty": nil, "short": golden[:headerLen-1], "long": packet(want, append(data, 'x')),
		"no op": packet(Header{}, nil), "unknown op": packet(Header{Op: Bye + 1}, nil), "negative": packet(Header{Op: Read, Off: -1}, nil),
	} {
		if h, _, err := Decode(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
}

func TestOpened(t *testing.T) {
	for _, o := range []Opened{{}, {Size: 5, Boot: 5}, {Size: 10, Boot: 2, Segments: []Segment{{2, 3}, {5, 0}, {8, 2}}}} {
		b, err := o.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeOpened(b); err != nil || !reflect.DeepEqual(*got, o) {
			t.Errorf("%+v, %v, want %+v", got, err, o)
		}
	}
	for _, o := range []Opened{
		{Size: -1}, {Size: 1, Boot: 2}, {Size: 1, Boot: -1}, {Size: 10, Boot: 3, Segments: []Segment{{2, 1}}},
		{Size: 10, Segments: []Segment{{0, 11}}}, {Size: 10, Segments: []Segment{{0, -1}}}, {Size: 10, Segments: []Segment{{1 << 62, 1 << 62}}},
		{Size: 10, Segments: []Segment{{5, 1}, {3, 1}}}, {Segments: make([]Segment, MaxSegments+1)},
	} {
		if _, err := o.Encode(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestManifests(t *testing.T) {
	d := digest.FromString("x")
	if got, err := ParseManifest([]byte(d)); got != d || err != nil {
		t.Errorf("%s, %v", got, err)
	}
	for _, bad := range []string{"", "sha256:", d.String() + "x", strings.Repeat("a", 300)} {
		if got, err := ParseManifest([]byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %s, %v", bad, got, err)
		}
	}
}

func TestErrors(t *testing.T) {
	for status, class := range classes {
		var h Header
		text := h.Fail(fmt.Errorf("open image: %w", class))
		err := h.Err(text)
		if h.Status != status || !errors.Is(err, class) || !strings.Contains(err.Error(), "open image") {
			t.Errorf("%v came as %d: %v", class, h.Status, err)
		}
	}
	var h Header
	if err := h.Err(nil); err != nil {
		t.Error(err)
	}
	text := h.Fail(errors.New(strings.Repeat("long", 1000)))
	if h.Status != other || len(text) != maxText || h.Err(text) == nil {
		t.Errorf("status %d, %d bytes", h.Status, len(text))
	}
	h.Status = 77 // of a later version
	if err := h.Err([]byte("a\nb\x1b[0m")); err == nil || strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("%q", err)
	}
	if h.Fail(context.Canceled); h.Status != 8 {
		t.Errorf("canceled is %d", h.Status)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(packet(Header{Op: Read, ID: 1, N: 5}, nil))
	f.Add(packet(Header{Op: Open, ID: 2}, []byte(digest.FromString("x"))))
	f.Add(packet(Header{Op: Open, Status: 2}, []byte("text")))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := Decode(b)
		if err != nil {
			return
		}
		if !bytes.Equal(packet(h, payload), b) || h.Off < 0 {
			t.Errorf("%+v of %x", h, b)
		}
		_, _ = ParseManifest(payload)
		_ = h.Err(payload)
	})
}

func FuzzOpened(f *testing.F) {
	b, err := (&Opened{Size: 10, Boot: 2, Segments: []Segment{{2, 3}, {8, 2}}}).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := DecodeOpened(b)
		if err != nil {
			return
		}
		if again, err := o.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%+v of %x: %v", o, b, err)
		}
	})
}
