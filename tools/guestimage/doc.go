// Package guestimage makes what a guest is given to run tatami-guest in:
//
//	extension  a disk image that unmodified Kata mounts in its own guest and
//	           whose processes kata-agent starts (kata-containers:
//	           docs/design/composable-vm-images.md)
//	tarball    files for a guest image of one's own, for the hooks of Kata's
//	           osbuilder
//	initramfs  the first root file system of the virtual machines that
//	           `tatami run` starts
//
// Equal input gives equal bytes, on any machine and in any directory: all times
// are 0, all owners root, all names sorted, and no program but this one takes
// part.
package guestimage
