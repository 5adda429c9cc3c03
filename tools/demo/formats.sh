#!/bin/sh
# Makes from the image of an OCI layout with gzip layers the same image in every
# other format, each by the format's own program or library.
# usage: formats.sh LAYOUT OUTDIR [FORMAT…]
#   OUTDIR/FORMAT is a layout with the tag "latest"; what is there already stays.
#   OUTDIR/estargz-external-toc is the image with the tables of contents that
#   the tag of estargz-external wants beside it, with "-esgztoc" behind it.
#   OUTDIR/times has a line for each format that was made: its name, seconds.
# The Nydus formats need nydus-image, in PATH or named by TATAMI_NYDUS_IMAGE.
set -eu
here=$(dirname "$0")
from=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- tar zstd zstd-frames zstdchunked zstdchunked-stargz \
	estargz estargz-inner estargz-external nydus5 nydus6 nydus6-lz4 nydus6-none nydus-ref
mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
(cd "$here/../.." && go build -o "$work/toformat" ./tests/bench/toformat) || {
	(cd "$here/../.." && go build -o - ./tests/bench/toformat >/dev/null)
	exit 1
}

recompress() { # FORMAT DIR: by the library that podman, buildah and skopeo share
	skopeo copy --quiet --dest-compress-format "$1" "oci:$from:latest" "oci:$2:latest"
}

for format; do
	[ ! -e "$out/$format/index.json" ] || continue
	start=$(date +%s%N)
	case $format in
	zstd) recompress zstd "$work/$format" ;;
	zstdchunked) recompress zstd:chunked "$work/$format" ;;
	*) "$work/toformat" "$format" "$from" "$work/$format" ;;
	esac
	echo "$format $((($(date +%s%N) - start) / 1000000))e-3" >>"$out/times"
	[ ! -e "$work/$format-toc" ] || { rm -rf "$out/$format-toc" && mv "$work/$format-toc" "$out/$format-toc"; }
	rm -rf "${out:?}/$format"
	mv "$work/$format" "$out/$format"
done
