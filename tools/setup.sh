#!/bin/sh
# Installs what building, running and testing Tatami needs on Debian, and
# nothing that is there already. Needs root.
set -eu

packages="qemu-system-x86 mmdebstrap docker-registry tinyproxy-bin umoci skopeo crun runc
erofs-utils protobuf-compiler busybox-static iproute2 attr acl git make
ca-certificates gcc libc6-dev e2fsprogs xfsprogs tar procps zstd python3-pip
cryptsetup-bin fdisk systemd containerd fuse3 amazon-ecr-credential-helper nginx prometheus"

missing=
for p in $packages; do
	dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing="$missing $p"
done
if [ -n "$missing" ]; then
	[ "$(id -u)" = 0 ] || { echo "setup: not root, cannot install:$missing" >&2; exit 1; }
	echo "setup: installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	apt-get -q update >/dev/null
	# A registry or a runtime that is installed here must not be started by it.
	printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d.tatami
	chmod +x /usr/sbin/policy-rc.d.tatami
	own=
	[ -e /usr/sbin/policy-rc.d ] || { mv /usr/sbin/policy-rc.d.tatami /usr/sbin/policy-rc.d; own=1; }
	# shellcheck disable=SC2086 # a list of words
	apt-get -q install -y --no-install-recommends $missing >/dev/null
	[ -z "$own" ] || rm -f /usr/sbin/policy-rc.d
	rm -f /usr/sbin/policy-rc.d.tatami
fi

# Go: any version from 1.21 on fetches the one that go.mod names by itself.
if ! command -v go >/dev/null && [ ! -x /usr/local/go/bin/go ]; then
	echo "setup: installing Go from backports"
	list=/etc/apt/sources.list.d/tatami-backports.list
	mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
	echo "deb $mirror bookworm-backports main" >"$list"
	apt-get -q update >/dev/null
	apt-get -q install -y --no-install-recommends -t bookworm-backports golang-go >/dev/null
fi
