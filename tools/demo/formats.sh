#!/bin/sh
# Makes from the image of an OCI layout with gzip layers the same image in every
# other format, each by the format's own program or library.
# usage: formats.sh LAYOUT OUTDIR [FORMAT…]
#   OUTDIR/FORMAT is a layout with the tag "latest"; what is there already stays.
#   OUTDIR/estargz-external-toc is the image with the tables of contents that
#   the tag of estargz-external wants beside it, with "-esgztoc" behind it.
#   OUTDIR/times has a line for each format that was made: its name, milliseconds.
# The Nydus formats need nydus-image, in PATH or named by TATAMI_NYDUS_IMAGE.
# CACHE is where programs are kept that have to be fetched.
set -eu
here=$(dirname "$0")
# shellcheck source=tools/demo/skopeo.sh
. "$here/skopeo.sh"
from=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- tar zstd zstd-frames zstdchunked zstdchunked-1 zstdchunked-stargz \
	estargz estargz-inner estargz-external nydus5 nydus6 nydus6-lz4 nydus6-none nydus-ref
mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
case $work in /*) ;; *) work=$PWD/$work ;; esac
(cd "$here/../.." && go build -o "$work/toformat" ./tests/bench/toformat)

for format; do
	[ ! -e "$out/$format/index.json" ] || continue
	start=$(date +%s%N)
	case $format in
	zstd) skopeo copy --quiet --dest-compress-format zstd "oci:$from:latest" "oci:$work/$format:latest" ;;
	zstdchunked)
		newer_skopeo "${CACHE:-$out}/skopeo" copy --quiet --dest-compress-format zstd:chunked \
			"oci:$from:latest" "oci:$work/$format:latest"
		;;
	zstdchunked-1) # its first form, with a footer of 40 bytes and other annotations
		skopeo copy --quiet --dest-compress-format zstd:chunked "oci:$from:latest" "oci:$work/$format:latest"
		;;
	*) "$work/toformat" "$format" "$from" "$work/$format" ;;
	esac
	echo "$format $((($(date +%s%N) - start) / 1000000))" >>"$out/times"
	[ ! -e "$work/$format-toc" ] || { rm -rf "$out/$format-toc" && mv "$work/$format-toc" "$out/$format-toc"; }
	rm -rf "${out:?}/$format"
	mv "$work/$format" "$out/$format"
done
