// Package posix looks at a read-only file system the way programs do. Its test binary
// goes into guests with a tree of Prepare to look at:
//
//	posix.test -readonly DIR
//
// Without the flag it looks at EROFS on a loop device of this machine, which shows that
// what it expects is not the device's invention.
//
// Of go-fuse's posixtest only one test does not write first. The tests here check what
// the others look at afterwards, with the files there from the beginning.
package posix
