// Package hosts reads trees of hosts.toml files, in which containerd and its
// users say where the images of a registry are asked for: mirrors, their
// capabilities, certificates and headers.
//
// The facts are those of containerd's docs/hosts.md and of
// core/remotes/docker/config/hosts.go:
//
//   - A root has a directory for each registry: "host_port_", "host:port" or
//     "host", else "_default". With several roots, the first that has one counts.
//   - Its hosts.toml lists hosts in the order in which they are asked; the last
//     one is "server", or without it the registry itself. The root table holds
//     the settings of the server.
//   - Without a hosts.toml, or with an empty one, certificate files of Docker's
//     pattern are settings of the registry itself: *.crt, *.cert with *.key.
//   - A host with "http" in its URL and any setting of TLS is tried with TLS first.
//
// A tree is read again when it has changed, without a restart. What differs from
// containerd: a file that is broken keeps the last good one in force, and says so;
// an unknown key is told once in the log; skip_verify and client certificates are
// for the host alone, not for where it redirects to; the registry itself speaks plain HTTP
// where the client's settings say so, not only on this machine.
package hosts
