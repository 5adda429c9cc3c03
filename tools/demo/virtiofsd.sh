#!/bin/sh
# Builds virtiofsd, the one in Rust that Kata Containers ships (4.1 has 1.14.0),
# from its crate; Debian 12 has only the one in C. Takes some minutes on two cores,
# once. Needs cargo; as root it installs the two libraries' headers.
# usage: virtiofsd.sh DIR        the program is DIR/bin/virtiofsd
set -eu
dir=$1
[ ! -x "$dir/bin/virtiofsd" ] || exit 0
command -v cargo >/dev/null || { echo "virtiofsd: cargo is not there; install Rust" >&2; exit 1; }
for p in libseccomp-dev libcap-ng-dev; do
	dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing="${missing:-} $p"
done
if [ -n "${missing:-}" ]; then
	[ "$(id -u)" = 0 ] || { echo "virtiofsd: not root, cannot install:$missing" >&2; exit 1; }
	apt-get -q update >/dev/null
	# shellcheck disable=SC2086 # a list of words
	DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing >/dev/null
fi
cargo install --quiet --locked --root "$dir" --version 1.14.0 virtiofsd
