#!/bin/sh
# Makes the image that `make run` shows: Debian with Python (first layer) and
# scientific packages (second layer), as an OCI layout, gzip layers.
# usage: image.sh DIR        the layout is DIR/oci, its tag "latest"
set -eu
dir=$1
[ ! -e "$dir/oci/index.json" ] || exit 0
mkdir -p "$dir"
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'umount "$work/bundle/rootfs/proc" 2>/dev/null || :; rm -rf "$work"' EXIT

sources() { # the machine's own apt sources, one file after the other
	for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
		[ ! -s "$f" ] || { cat "$f"; echo; }
	done
}
sources >"$work/sources"

echo "making a Debian root file system (once; kept in $dir)"
mmdebstrap --quiet --variant=minbase --include=python3,ca-certificates \
	--format=tar bookworm "$work/base.tar" - <"$work/sources"

umoci init --layout "$work/oci"
umoci new --image "$work/oci:latest"
umoci raw add-layer --image "$work/oci:latest" "$work/base.tar"
umoci unpack --image "$work/oci:latest" "$work/bundle"

root=$work/bundle/rootfs
echo "adding NumPy, pandas, SciPy and Django as a second layer"
cp /etc/resolv.conf "$root/etc/resolv.conf" 2>/dev/null || :
mount -t proc proc "$root/proc"
chroot "$root" sh -c 'export DEBIAN_FRONTEND=noninteractive
	apt-get -q update && apt-get -q install -y --no-install-recommends \
	python3-numpy python3-pandas python3-scipy python3-django python3-requests
	apt-get clean; rm -rf /var/lib/apt/lists/*' >"$work/apt.log" 2>&1 || { cat "$work/apt.log"; exit 1; }
umount "$root/proc"
umoci repack --image "$work/oci:latest" "$work/bundle"
umoci config --image "$work/oci:latest" --config.entrypoint python3 \
	--config.cmd=-c --config.cmd='import sys; print("Python", sys.version.split()[0], "runs from an image that is not here yet")' \
	--config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
umoci gc --layout "$work/oci"
mv "$work/oci" "$dir/oci"
