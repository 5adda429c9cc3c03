#!/bin/sh
# Makes image.tar.gz: see README.md. Needs root (owners, a device node), GNU tar,
# setfattr, awk, python3, and in $SOCI and $SOCI_V1 the two programs.
set -eu
out=$PWD/image.tar.gz
span=16384
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

# text BYTES SEED: words from a small vocabulary, which compress to a sixth.
text() {
	awk -v n="$1" -v x="$2" 'BEGIN {
		while (len < n) {
			x = (x * 16807) % 2147483647
			w = "w" (x % 97) * 7919 (x % 5 ? " " : "\n")
			printf "%s", w
			len += length(w)
		}
	}'
}

mkdir -p a/etc a/bin a/empty b/etc b/var c/srv
text 90000 1 >a/bin/large
text 3000 2 >a/etc/small
text 30000 3 >a/etc/middle
: >a/etc/nothing
for i in 1 2 3 4 5 6 7 8; do text $((i * 300)) "$i" >a/etc/f$i; done
ln a/bin/large a/bin/hard
ln -s ../bin/large a/etc/soft
mknod a/null c 1 3
mkfifo a/pipe
chmod 4755 a/bin/large
chmod 2775 a/empty
chown 1000:100 a/etc/small
setfattr -n user.comment -v 'zwölf' a/etc/small
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 a/bin/large
touch a/etc/"name with späces $(printf 'x%.0s' $(seq 150))"

: >b/etc/.wh.small
: >b/var/.wh..wh..opq
text 30000 4 >b/etc/again
text 20000 5 >b/var/more

text 12000 6 >c/srv/plain
echo hello >c/srv/hello

pack() { tar --sort=name --format=posix --xattrs --xattrs-include='*' --numeric-owner --mtime='2024-05-06 07:08:09.123456789Z' -C "$1" -cf "$1.tar" .; }
pack a
pack b
pack c
# Little memory makes short blocks, and so spans that do not begin with a byte.
python3 -c 'import sys, zlib
z = zlib.compressobj(9, zlib.DEFLATED, 31, 4)
sys.stdout.buffer.write(z.compress(open("a.tar", "rb").read()) + z.flush())' >a.tar.gz
# Two members, with names in their headers, cut at an odd place.
head -c 30001 b.tar >b1 && tail -c +30002 b.tar >b2
gzip -9 b1 b2
cat b1.gz b2.gz >b.tar.gz

mkdir -p in/blobs/sha256
add() { # FILE: puts it into the layout and prints digest and size for a descriptor
	sum=$(sha256sum <"$1" | cut -d' ' -f1)
	cp "$1" "in/blobs/sha256/$sum"
	printf '"digest":"sha256:%s","size":%s' "$sum" "$(stat -c %s "$1")"
}
layer=application/vnd.oci.image.layer.v1.tar
diff() { printf '"sha256:%s"' "$(sha256sum | cut -d' ' -f1)"; }
printf '{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%s,%s,%s]}}' \
	"$(zcat a.tar.gz | diff)" "$(zcat b.tar.gz | diff)" "$(diff <c.tar)" >config
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json",%s},"layers":[{"mediaType":"%s+gzip",%s},{"mediaType":"%s+gzip",%s},{"mediaType":"%s",%s}]}' \
	"$(add config)" $layer "$(add a.tar.gz)" $layer "$(add b.tar.gz)" $layer "$(add c.tar)" >manifest
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",%s,"platform":{"os":"linux","architecture":"amd64"}}]}' \
	"$(add manifest)" >in/index.json
echo '{"imageLayoutVersion":"1.0.0"}' >in/oci-layout

"$SOCI" convert --standalone --format oci-dir --platform linux/amd64 --span-size $span --min-layer-size 0 in v2
mkdir v1
"$SOCI_V1" in v1 $span

# One layout with the blobs of both; the index is the one of version 2.
cp -n v1/blobs/sha256/* v2/blobs/sha256/
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C v2 -c blobs index.json | gzip -9 -n >"$out"
