package passthrough

import (
	"runtime"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// as makes what create makes belong to the guest's caller. The thread has the
// caller's identity meanwhile, and no capabilities over files but CAP_DAC_OVERRIDE:
// the guest has checked permissions, with groups of the caller that are not known
// here. Root of the guest is whoever this process is, as with virtiofsd.
func as(caller fuse.Caller, create func() error) error {
	uid, gid := unix.Geteuid(), unix.Getegid()
	asUID, asGID := uid, gid
	if caller.Uid != 0 {
		asUID = int(caller.Uid)
	}
	if caller.Gid != 0 {
		asGID = int(caller.Gid)
	}
	if asUID == uid && asGID == gid {
		return create()
	}
	runtime.LockOSThread()
	err := setIdentity(asUID, asGID)
	if err == nil && asUID != uid {
		err = raise(unix.CAP_DAC_OVERRIDE)
	}
	if err == nil {
		err = create()
	}
	// A thread that cannot go back stays locked, and ends with its goroutine.
	if setIdentity(uid, gid) == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// setIdentity changes what this thread is for file systems. With the user, the kernel
// drops and takes back the effective capabilities over files (capabilities(7)).
func setIdentity(uid, gid int) error {
	// These calls report no error, but who one was.
	for _, set := range []struct {
		call func(int) (int, error)
		id   int
	}{{unix.SetfsgidRetGid, gid}, {unix.SetfsuidRetUid, uid}} {
		if _, err := set.call(set.id); err != nil {
			return err
		}
		if now, err := set.call(-1); err != nil || now != set.id {
			return unix.EPERM
		}
	}
	return nil
}

// capabilities are the sets of a thread.
type capabilities [2]unix.CapUserData

func (c *capabilities) header() *unix.CapUserHeader {
	return &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
}

func (c *capabilities) get() error { return unix.Capget(c.header(), &c[0]) }
func (c *capabilities) set() error { return unix.Capset(c.header(), &c[0]) }

// raise makes a capability effective in this thread, if it is permitted.
func raise(capability uint) error {
	var c capabilities
	if err := c.get(); err != nil {
		return err
	}
	bit := uint32(1) << (capability % 32)
	if c[capability/32].Permitted&bit == 0 {
		return nil
	}
	c[capability/32].Effective |= bit
	return c.set()
}

// unprivileged does something as one who may not keep set-user-ID bits, when that is
// asked for: the kernel clears them unless the thread has CAP_FSETID.
func unprivileged(kill bool, do func() error) error {
	if !kill {
		return do()
	}
	runtime.LockOSThread()
	var before capabilities
	err := before.get()
	if err == nil {
		less := before
		less[0].Effective &^= 1 << unix.CAP_FSETID
		err = less.set()
	}
	if err == nil {
		err = do()
	}
	// A thread that cannot go back stays locked, and ends with its goroutine.
	if before.set() == nil {
		runtime.UnlockOSThread()
	}
	return err
}
