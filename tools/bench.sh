#!/bin/sh
# `make bench`: the measurements that README.md quotes. Everything that is
# compared runs in the same invocation, alternating; medians and ratios are
# printed. Takes about half an hour on two cores.
set -eu
cd "$(dirname "$0")/.."
cache=${CACHE:?}
rounds=${ROUNDS:-3} vm_rounds=${VM_ROUNDS:-${ROUNDS:-3}}
. tools/demo/registry.sh
work=$(mktemp -d)
cleanup() {
	[ -z "${MOUNT_PID:-}" ] || { kill -INT "$MOUNT_PID" 2>/dev/null || :; wait "$MOUNT_PID" 2>/dev/null || :; }
	umount "$work/ext4" "$work/erofs" 2>/dev/null || :
	stop_registry
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
section() { printf '\n## %s\n\n' "$1"; }

tools/demo/image.sh "$cache/image"
start_registry "$cache/registry"
push() { skopeo copy --quiet --preserve-digests --dest-tls-verify=false "oci:$1:latest" "docker://$REGISTRY/$2"; }
push "$cache/image/oci" bench/gzip:v1
tools/demo/formats.sh "$cache/image/oci" "$cache/image" estargz
push "$cache/image/estargz" bench/estargz:v1

all='import os
for d, _, names in os.walk("/"):
    if d.split("/")[1] in ("proc", "sys", "dev"): continue
    for n in names:
        p = os.path.join(d, n)
        if os.path.isfile(p) and not os.path.islink(p):
            with open(p, "rb") as f:
                while f.read(1 << 20): pass'
libs='import numpy, pandas, scipy.stats, django'

for image in gzip estargz; do
	section "start in a virtual machine: Python prints a line, $image image"
	bin/tatami bench start --rounds "$vm_rounds" "$REGISTRY/bench/$image:v1" 2>"$work/log" || { cat "$work/log"; exit 1; }
	section "the same without a virtual machine"
	bin/tatami bench start --vm none --rounds "$rounds" "$REGISTRY/bench/$image:v1" 2>"$work/log" || { cat "$work/log"; exit 1; }
	section "import of numpy, pandas, scipy and django, without a virtual machine, $image image"
	bin/tatami bench start --vm none --rounds "$rounds" "$REGISTRY/bench/$image:v1" -- -c "$libs" 2>"$work/log" || { cat "$work/log"; exit 1; }
	section "reading every file once, without a virtual machine, $image image"
	bin/tatami bench start --vm none --rounds "$rounds" "$REGISTRY/bench/$image:v1" -- -c "$all" 2>"$work/log" || { cat "$work/log"; exit 1; }
done

section "file systems with the same tree, everything local"
mkdir -p "$work/tatami" "$work/ext4" "$work/erofs" "$work/loop"
mount_image() { # DIR FLAGS…: the node has everything
	dir=$1
	shift
	bin/tatami mount --root "$work/root" "$@" "$REGISTRY/bench/gzip:v1" "$dir" >"$work/mount.log" 2>&1 &
	MOUNT_PID=$!
	until grep -q 'is mounted' "$work/mount.log"; do
		kill -0 "$MOUNT_PID" || { cat "$work/mount.log"; exit 1; }
		sleep 0.2
	done
}
unmount_image() { kill -INT "$MOUNT_PID"; wait "$MOUNT_PID" || :; MOUNT_PID=; }
mount_image "$work/tatami" --mount-path file
truncate -s 3G "$work/ext4.img" && mkfs.ext4 -q -d "$work/tatami" "$work/ext4.img"
mkfs.erofs "$work/erofs.img" "$work/tatami" >/dev/null
mount -o loop,ro "$work/ext4.img" "$work/ext4"
mount -o loop,ro "$work/erofs.img" "$work/erofs"
go run ./tests/bench/fsbench -rounds "$rounds" "ext4=$work/ext4" "native EROFS=$work/erofs" "Tatami, file=$work/tatami"
unmount_image
mount_image "$work/tatami" --mount-path loop
go run ./tests/bench/fsbench -rounds "$rounds" "ext4=$work/ext4" "native EROFS=$work/erofs" "Tatami, loop=$work/tatami"
unmount_image
mount_image "$work/tatami" --mount-path loop --keep "$work/keep" --fill
until grep -qs "$work/keep" /sys/block/loop*/loop/backing_file; do sleep 1; done
go run ./tests/bench/fsbench -rounds "$rounds" "ext4=$work/ext4" "native EROFS=$work/erofs" "Tatami, complete=$work/tatami"
unmount_image

section "building"
go test -run '^$' -bench 'Build|Inflate|Hit' -benchtime 2s ./rootfs/bootstrap ./rootfs/layer/... ./rootfs/store | grep -E '^(Benchmark|pkg)'

section "snapshotter: layers as in containerd's benchsuite beside its overlayfs, and containers by mode, through a socket"
go test -run '^$' -bench 'Layers|Container' -benchtime 2s ./host/snapshotter | grep '^Benchmark'

section "containerd 2.4 and runc: a pull, and from there the first command, with its overlayfs and with ours (share)"
TATAMI_BENCH_IMAGE=$REGISTRY/bench/gzip:v1 go test -run "^$" -bench Start -benchtime 3x -timeout 30m ./tests/containerd | grep "^Benchmark"
TATAMI_BENCH_IMAGE=$REGISTRY/bench/estargz:v1 go test -run "^$" -bench Start -benchtime 3x -timeout 30m ./tests/containerd | grep "^Benchmark"

section "memory"
go build -o "$work/hostmem" ./tests/bench/hostmem
"$work/hostmem" bin/tatami-host 100000
