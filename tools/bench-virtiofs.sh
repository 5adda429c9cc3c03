#!/bin/sh
# `make bench-virtiofs`: images over virtio-fs against the other ways into a guest,
# and against other devices. Everything that is compared runs in the same
# invocation, alternating; medians and ratios are printed, in Markdown. ROUNDS is how
# often everything is measured (1: the whole takes less than ten minutes on two cores
# that nobody else uses, under emulation).
set -eu
cd "$(dirname "$0")/.."
cache=${CACHE:?}
rounds=${ROUNDS:-1}
section() { printf '\n## %s\n\n' "$1"; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

if command -v cargo >/dev/null; then
	tools/demo/virtiofsd.sh "$cache/virtiofsd"
	export TATAMI_VIRTIOFSD="$cache/virtiofsd/bin/virtiofsd"
fi

section "one image, several machines: seconds and MiB of memory, and against a full pull (lower is better)"
go build -o "$work/sandboxes" ./tests/bench/sandboxes
PATH=$PWD/bin:$PATH "$work/sandboxes" -rounds "$rounds" 2>"$work/log" || { cat "$work/log"; exit 1; }

section "one tree in one guest, by device: seconds, and times the first (lower is better)"
TATAMI_BENCH_ROUNDS=$((rounds * 3)) go test -run '^$' -bench Devices -benchtime 1x -timeout 1h ./tests/virtiofsvm >"$work/log" || { cat "$work/log"; exit 1; }
grep '^|' "$work/log"
