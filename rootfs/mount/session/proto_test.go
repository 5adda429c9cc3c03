package session

import (
	"encoding/binary"
	"testing"

	"github.com/containerd/errdefs"
)

// kernelInit is the INIT request of a kernel that offers flags.
func kernelInit(minor, flags, flags2 uint32) []byte {
	b := make([]byte, inHeaderSize+64)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], opInit)
	binary.NativeEndian.PutUint64(b[8:], 2)
	for i, v := range []uint32{protoMajor, minor, 128 << 10, flags, flags2} {
		binary.NativeEndian.PutUint32(b[inHeaderSize+4*i:], v)
	}
	return b
}

func TestModeFollowsOffer(t *testing.T) {
	for _, tc := range []struct {
		name   string
		flags2 uint32
		want   Mode
		got    Mode
		ok     bool
	}{
		{"auto, new kernel", flagHasResend, Auto, Direct, true},
		{"auto, old kernel", 0, Auto, Journal, true},
		{"journal, new kernel", flagHasResend, Journal, Journal, true},
		{"direct, new kernel", flagHasResend, Direct, Direct, true},
		{"direct, old kernel", 0, Direct, "", false},
		{"nonsense", flagHasResend, "x", "", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req, err := parseInit(kernelInit(41, 0xffffffff, tc.flags2))
			if err != nil {
				t.Fatal(err)
			}
			got, err := chooseMode(tc.want, req.canResend())
			if got != tc.got || (err == nil) != tc.ok {
				t.Errorf("mode %q, error %v", got, err)
			}
		})
	}
}

func TestInitReply(t *testing.T) {
	req, err := parseInit(kernelInit(31, flagMaxPages|flagAsyncDIO|1<<1, 0))
	if err != nil {
		t.Fatal(err)
	}
	out := req.reply()
	word := func(off int) uint32 { return binary.NativeEndian.Uint32(out[off:]) }
	if len(out) != 80 || word(0) != 80 || word(4) != 0 || binary.NativeEndian.Uint64(out[8:]) != 2 {
		t.Errorf("reply header % x", out[:16])
	}
	if word(20) != 31 {
		t.Errorf("minor %d, want the kernel's", word(20))
	}
	if word(28) != flagMaxPages|flagAsyncDIO {
		t.Errorf("flags %#x: only what was offered and is needed", word(28))
	}
}

func TestParseInitRefuses(t *testing.T) {
	other := kernelInit(31, 0, 0)
	binary.NativeEndian.PutUint32(other[4:], opInterrupt)
	major := kernelInit(31, 0, 0)
	binary.NativeEndian.PutUint32(major[inHeaderSize:], 8)
	for name, msg := range map[string][]byte{"empty": nil, "header": other[:inHeaderSize], "other": other, "short": kernelInit(31, 0, 0)[:50], "major": major} {
		if _, err := parseInit(msg); err == nil {
			t.Errorf("%s: accepted", name)
		} else if !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v has no class", name, err)
		}
	}
}

func FuzzParseInit(f *testing.F) {
	f.Add(kernelInit(41, 0xffffffff, 0xffffffff))
	f.Add(kernelInit(31, 0, 0)[:inHeaderSize+16])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if req, err := parseInit(b); err == nil && len(req.reply()) != outHeaderSize+initOutSize {
			t.Error("reply has a wrong size")
		}
	})
}
