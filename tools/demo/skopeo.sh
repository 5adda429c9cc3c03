#!/bin/sh
# Sourced: newer_skopeo DIR runs what it is told to with a skopeo that makes
# today's zstd:chunked (Debian 12's makes the first form of it): the machine's
# own if it is one, else that of Debian 13, unpacked once in DIR.
# usage: newer_skopeo DIR ARG…

newer_skopeo() {
	dir=$1
	shift
	case $(skopeo --version) in
	*' version 1.'[0-9].* | *' version 1.1'[0-3].*) ;;
	*)
		skopeo "$@"
		return
		;;
	esac
	if [ ! -x "$dir/usr/bin/skopeo" ]; then
		rm -rf "$dir"
		mkdir -p "$(dirname "$dir")"
		mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
		mmdebstrap --quiet --variant=extract --include=skopeo trixie "$dir.new" "deb $mirror trixie main" 2>/dev/null
		mv "$dir.new" "$dir"
	fi
	set -- "$dir"/usr/lib64/ld-linux-x86-64.so.2 --library-path "$dir/usr/lib/x86_64-linux-gnu" "$dir/usr/bin/skopeo" "$@"
	"$@"
}
