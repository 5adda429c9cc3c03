// Package checknode inspects a node: which handlers containerd has, which
// snapshotter and so which mode of Tatami each would use, what is missing for
// that, and the line to add in which file. It reads files, opens sockets and
// asks containerd for its version; it never writes anything.
//
// Facts about containerd are of its versions 1.6.20, 1.7.27 and 2.0 to 2.4, about
// Kata Containers of 4.1.0; the upstream file is named where one is used.
package checknode
