// Package run starts one container from an image that is not there yet: it has
// the node prepare the image while a virtual machine boots, mounts the image
// in the machine, runs the container and tells where the time went.
//
// It talks to tatami-host and tatami-guest over their protocols only.
package run
