package imagefs

import (
	"os"
	"testing"
)

// A thread is dying when it is being killed, not when another signal waits.
func TestDying(t *testing.T) {
	if dying(0) || dying(uint32(os.Getpid())) || dying(1<<31) {
		t.Error("nobody was killed")
	}
	for text, want := range map[string]bool{
		"":                            false,
		"SigPnd:\t0000000000000000\n": false,
		"SigPnd:\t0000000000400000\nShdPnd:\t0000000000400000\n":                false, // SIGURG
		"Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n":      true,
		"SigPnd:\t0000000000000000\nShdPnd:\t0000000000400100\nSigBlk:\t0\n":    true,
		"SigPnd:\t0000000000000000\nShdPnd:\tx\nSigBlk:\t0000000000000100\n":    false,
		"SigBlk:\t0000000000000100\nSigIgn:\t0000000000000100\nSigCgt:\t0100\n": false,
	} {
		if got := killPending([]byte(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
