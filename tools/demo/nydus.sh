#!/bin/sh
# Builds nydus-image, which no Debian package has, from its crate; takes some
# ten minutes on two cores, once. Needs cargo.
# usage: nydus.sh DIR        the program is DIR/bin/nydus-image
set -eu
dir=$1
[ ! -x "$dir/bin/nydus-image" ] || exit 0
command -v cargo >/dev/null || { echo "nydus: cargo is not there; install Rust" >&2; exit 1; }
cargo install --quiet --locked --root "$dir" --version 2.2.0 --bin nydus-image nydus-rs
