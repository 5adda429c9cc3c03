// Package kata finds the sandboxes of Kata Containers on a node, says how each
// can be told from the others, and to which of them a container belongs. It
// asks an unmodified Kata and an unmodified containerd:
//
//	<run dir>/<sandbox>/shim-monitor.sock
//	    HTTP of the shim. GET /agent-url says where the agent of the virtual
//	    machine listens, and so what machine it is. Run directories are
//	    /run/kata (runtime-rs: src/libs/shim-interface/src/lib.rs) and
//	    /run/vc/sbs (Go: src/runtime/pkg/containerd-shim-v2/shim_management.go).
//	<state>/io.containerd.runtime.v2.task/<namespace>/<container>/config.json
//	    the OCI bundle that containerd made for the shim
//	    (containerd core/runtime/v2/bundle.go); its annotations name sandbox
//	    and image.
//
// Both shims open their socket when the sandbox has been made
// (runtime-rs/crates/runtimes/src/manager.rs; containerd-shim-v2/create.go),
// and remove their directory with it.
//
// Everything read here is bounded in size and time. Names are plain path
// components; no symbolic link leads out of a directory that was configured,
// and a hybrid socket must lie below a directory that is named like its
// sandbox.
//
// Locks: notifier.mu is a leaf. All else belongs to the one goroutine of
// Watcher.Run.
package kata
