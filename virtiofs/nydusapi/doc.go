// Package nydusapi is the part of nydusd's HTTP API that Kata's runtimes use, with
// which tatami-virtiofsd stands where nydusd does (shared_fs "virtio-fs-nydus"):
//
//	GET    /api/v1/daemon              200 {"id":…,"version":{…},"state":"RUNNING"}
//	POST   /api/v1/mount?mountpoint=P  204; body {"fs_type":…,"source":…,"config":…}
//	DELETE /api/v1/mount?mountpoint=P  204
//	an error                           4xx or 5xx {"code":…,"message":…}
//
// There are two kinds of mounts: "passthrough_fs" at /containers, the directory that
// Kata shares with the guest, which it mounts before the machine starts, and "rafs"
// at /rafs/<container>/lowerdir, the image of a container. What a mount shows is not
// decided here (Mounts).
//
// The clients are src/runtime/virtcontainers/nydusd.go and, of runtime-rs,
// crates/resource/src/share_fs/nydus/nydus_client.rs of kata-containers 7c6ba40c54ea
// (4.1.0). They wait 30 s for an answer.
package nydusapi
