#!/bin/sh
# `make bench-formats`: every image format on one image with PyTorch, 1.8 GB.
# Everything that is compared runs in the same invocation, alternating; medians
# and ratios are printed, in Markdown. FORMATS are the formats, ROUNDS the runs
# of each, ALL_ROUNDS those that read everything; a round of one format takes
# some minutes.
set -eu
cd "$(dirname "$0")/.."
cache=${CACHE:?}
rounds=${ROUNDS:-3} all_rounds=${ALL_ROUNDS:-${ROUNDS:-3}} link=${LINK:-1gbit,5ms}
formats=${FORMATS:-gzip gzip-index tar zstd zstd-frames zstdchunked zstdchunked-stargz estargz estargz-inner nydus5 nydus6 nydus-ref}
. tools/demo/registry.sh
if [ -z "${TATAMI_NYDUS_IMAGE:-}" ] && [ -x "$cache/nydus/bin/nydus-image" ]; then
	export TATAMI_NYDUS_IMAGE="$cache/nydus/bin/nydus-image"
fi
work=$(mktemp -d)
trap 'stop_registry; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
section() { printf '\n## %s\n\n' "$1"; }
seconds() { # COMMAND…: how long it takes
	from=$(date +%s%N)
	"$@" >/dev/null
	awk "BEGIN { printf \"%.2f\", $(($(date +%s%N) - from)) / 1e9 }"
}

tools/demo/torch.sh "$cache/torch"
v1=$cache/torch/v1 v2=$cache/torch/v2
indexed() { # DIR: the image of DIR/oci with a bound index
	[ -e "$1/gzip-index/index.json" ] || bin/tatami index --quiet --bind "oci:$1/oci:latest" "oci:$1/gzip-index:latest" >/dev/null
}
for f in $formats; do
	case $f in
	gzip) ;;
	gzip-index) indexed "$v1" && indexed "$v2" ;;
	*) tools/demo/formats.sh "$v1/oci" "$v1" "$f" ;;
	esac
done
[ -e "$v1/gzip" ] || ln -s oci "$v1/gzip"
go build -o "$work/push" ./tests/bench/push
go build -o "$work/formattable" ./tests/bench/formattable
start_registry "$cache/registry"
"$work/push" "$v2/oci" "$REGISTRY/torch/gzip" v2
[ ! -e "$v2/gzip-index" ] || "$work/push" "$v2/gzip-index" "$REGISTRY/torch/gzip-index" v2
for f in $formats; do
	[ "$f" != nydus-ref ] || "$work/push" "$v1/oci" "$REGISTRY/torch/$f" gzip
	"$work/push" "$v1/$f" "$REGISTRY/torch/$f" v1
done

line='print("hello")'
import='import torch; print(torch.ones(2).sum())'
all='import os
for d, _, names in os.walk("/"):
    if d.split("/")[1] in ("proc", "sys", "dev"): continue
    for n in names:
        p = os.path.join(d, n)
        if os.path.isfile(p) and not os.path.islink(p):
            with open(p, "rb") as f:
                while f.read(1 << 20): pass'
mkdir "$work/runs"
start() { # PROGRAM FORMAT ROUND WAYS
	eval "code=\$$1"
	bin/tatami bench start --vm none --link "$link" --ways "$4" --format json "$REGISTRY/torch/$2:v1" -- -c "$code" \
		>"$work/runs/$1.$2.$3.json" 2>"$work/log" || { echo "$2 cannot be started:" >&2; tail -n 2 "$work/log" >&2; }
}
for round in $(seq "$rounds"); do
	for program in line import all; do
		[ $program != all ] || [ "$round" -le "$all_rounds" ] || continue
		for f in $formats; do
			ways=cold,warm
			[ "$f" != gzip ] || ways=full,cold,warm
			start "$program" "$f" "$round" "$ways"
		done
	done
done
section "starts, times faster than a full pull of the gzip image (link $link; higher is better)"
"$work/formattable" "$work/runs" $formats

section "the index of the gzip image, and building it against decompressing"
root=$work/node
bin/tatami run --vm none --root "$root" --format json --report "$work/report" "$REGISTRY/torch/gzip:v1" -- -c "$line" >/dev/null 2>&1
layers=$(python3 -c 'import json, sys
print(*(p["took_s"] for p in json.load(open(sys.argv[1]))["phases"] if p["name"] == "layers"))' "$work/report")
blobs=$(find "$v1/oci/blobs/sha256/" -size +1M)
gzip=$(seconds sh -c 'for b; do gzip -dc <"$b"; done' sh $blobs)
std=$(go run ./tests/bench/gunzip $blobs)
plain=$(cat $blobs | gzip -dc | wc -c)
packed=$(cat $blobs | wc -c)
index=$(du -cb "$root/layers" "$root/images" | tail -n 1 | cut -f 1)
awk -v l="$layers" -v g="$gzip" -v s="$std" -v p="$plain" -v i="$index" -v c="$packed" 'BEGIN {
	print "| | MB/s of plain bytes | against it |"; print "|---|---|---|"
	printf "| download, index, digests | %.0f | 1.0× |\n", p / l / 1e6
	printf "| compress/gzip | %.0f | %.1f× |\n", p / s / 1e6, l / s
	printf "| gzip -dc | %.0f | %.1f× |\n", p / g / 1e6, l / g
	printf "\nThe node keeps %.1f MB of index: %.2f %% of the compressed image.\n", i / 1e6, 100 * i / c }'

section "the next version of the image on the same node: all of it is read"
echo "| | over the link | of | more on the node's disk | beside |"
echo "|---|---|---|---|---|"
for f in gzip gzip-index; do
	case " $formats " in *" $f "*) ;; *) continue ;; esac
	root=$work/next-$f
	bin/tatami run --vm none --root "$root" --format json --report "$work/report" "$REGISTRY/torch/$f:v1" -- -c "$all" >/dev/null 2>&1
	sleep 5 # what is kept twice is found in the background
	before=$(du -sB1 "$root/store" | cut -f 1)
	bin/tatami run --vm none --root "$root" --format json --report "$work/report" "$REGISTRY/torch/$f:v2" -- -c "$all" >/dev/null 2>&1
	sleep 5
	after=$(du -sB1 "$root/store" | cut -f 1)
	python3 -c 'import json, sys
r = json.load(open(sys.argv[1]))
before, after = map(int, sys.argv[3:])
print("| %s | %.1f MB | %.1f | %.0f MB | %.0f |" % (sys.argv[2], r["fetched"] / 1e6, r["compressed_size"] / 1e6, (after - before) / 1e6, before / 1e6))' "$work/report" "$f" "$before" "$after"
done

section "index artifact"
bin/tatami index --quiet "oci:$v1/oci:latest" "oci:$work/indexed:latest"

section "conversion, seconds"
echo "| format | its own program | tatami convert |"
echo "|---|---|---|"
for f in estargz zstdchunked; do
	rm -rf "$work/theirs" "$work/ours"
	theirs=$(seconds tools/demo/formats.sh "$v1/oci" "$work/theirs" "$f")
	ours=$(seconds bin/tatami convert --to "$f" "oci:$v1/oci:latest" "oci:$work/ours:latest") || ours=-
	echo "| $f | $theirs | $ours |"
done
