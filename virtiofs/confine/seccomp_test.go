package confine

import (
	"slices"
	"testing"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The list is one for all machines that the program is built for.
func TestNamesOfSystemCalls(t *testing.T) {
	for _, machine := range []string{"amd64", "arm64"} {
		info, err := arch.GetInfo(machine)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range slices.Concat(allowed, refused, fileCalls) {
			if _, ok := info.SyscallNames[name]; !ok {
				t.Errorf("%s has no %s", machine, name)
			}
		}
	}
}

// data is struct seccomp_data with its 32-bit words big-endian, as bpf.VM reads.
func data(nr, machine uint32, args ...uint64) []byte {
	b := make([]byte, 64)
	put := func(off int, v uint32) {
		b[off], b[off+1], b[off+2], b[off+3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
	}
	put(0, nr)
	put(4, machine)
	for i, a := range args {
		put(16+8*i, uint32(a)) // the low word comes first on both machines
		put(20+8*i, uint32(a>>32))
	}
	return b
}

// verdict is what all policies together say, the strictest of them.
func verdict(t *testing.T, in []byte) seccomp.Action {
	t.Helper()
	for _, p := range policies(7, seccomp.ActionKillProcess) {
		prog, err := p.Assemble()
		if err != nil {
			t.Fatal(err)
		}
		vm, err := bpf.NewVM(prog)
		if err != nil {
			t.Fatal(err)
		}
		n, err := vm.Run(in)
		if err != nil {
			t.Fatal(err)
		}
		if a := seccomp.Action(n); a != seccomp.ActionAllow {
			return a
		}
	}
	return seccomp.ActionAllow
}

func TestVerdicts(t *testing.T) {
	info, err := arch.GetInfo("")
	if err != nil {
		t.Fatal(err)
	}
	machine := uint32(info.ID)
	for _, tc := range []struct {
		name string
		args []uint64
		want bool
	}{
		{"read", nil, true}, {"execve", nil, false}, {"openat", nil, false}, {"socket", nil, false},
		{"mmap", []uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE}, true},
		{"mmap", []uint64{0, 4096, unix.PROT_EXEC}, false},
		{"mmap", []uint64{0, 4096, 0xffff_ffff_ffff_ffff}, false},
		{"mprotect", []uint64{0, 4096, unix.PROT_READ}, true}, {"mprotect", []uint64{0, 4096, 7}, false},
		{"clone", []uint64{unix.CLONE_THREAD | unix.CLONE_VM}, true}, {"clone", []uint64{uint64(unix.SIGCHLD)}, false},
		{"clone", []uint64{unix.CLONE_NEWUSER}, false}, {"clone", []uint64{unix.CLONE_THREAD << 32}, false},
		{"tgkill", []uint64{7, 9, 23}, true}, {"tgkill", []uint64{8, 8, 9}, false}, {"tgkill", []uint64{7 | 1<<32, 8, 9}, false},
		{"prctl", []uint64{unix.PR_SET_VMA}, true}, {"prctl", []uint64{unix.PR_SET_DUMPABLE, 1}, false},
	} {
		got := verdict(t, data(uint32(info.SyscallNames[tc.name]), machine, tc.args...))
		if (got == seccomp.ActionAllow) != tc.want {
			t.Errorf("%s %#x: %v", tc.name, tc.args, got)
		}
	}
	// A number that is allowed here may mean anything by another convention.
	if got := verdict(t, data(3, machine+1)); got == seccomp.ActionAllow {
		t.Error("another machine's calls are allowed")
	}
	// The argument of a rule must not pass for the number of a call.
	for name, nr := range info.SyscallNames {
		if got := verdict(t, data(uint32(info.SyscallNames["clone"]), machine, uint64(nr))); got == seccomp.ActionAllow {
			t.Errorf("clone with flags %d (%s) is allowed", nr, name)
		}
	}
}
