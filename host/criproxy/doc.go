// Package criproxy stands between the kubelet and containerd's image service, to see
// what the kubelet passes with each pull: for which pod it is, and the credentials of that
// pod's imagePullSecrets and of the kubelet's own credential providers. Every call goes on
// to containerd and comes back as it is; nothing is decoded but what a pull brings.
//
// Credentials are in memory only. They are those of a repository, and are forgotten
// when containerd has no image of it any more. They are in no error, log record or
// file. Where a supervisor gives its workers a memfd (memfd_create(2)), the next
// worker has them, too; that memory goes with the last process that holds it.
//
// # Locks
//
//	Keys.mu, then Memory.mu. Nothing is waited for under them.
package criproxy
