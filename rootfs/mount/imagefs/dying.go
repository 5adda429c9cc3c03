package imagefs

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// dying says whether a thread is being killed, which is when SIGKILL is pending
// for it or its process (proc(5), SigPnd and ShdPnd: bit n-1 is signal n). One
// that cannot be looked at is not.
func dying(pid uint32) bool {
	if pid == 0 {
		return false
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	return killPending(status)
}

// killPending looks for SIGKILL in the text of a status file.
func killPending(status []byte) bool {
	for line := range bytes.Lines(status) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if string(name) != "SigPnd" && string(name) != "ShdPnd" {
			continue
		}
		mask, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
		if err == nil && mask&(1<<(syscall.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}
