#!/bin/sh
# Makes the image that `make bench-formats` measures: Debian with Python (first
# layer), PyTorch from the package index (second layer) and a small program
# (third layer), as OCI layouts with gzip layers, 1.8 GB unpacked.
# usage: torch.sh DIR
#   DIR/v1/oci   the image, tag "latest"
#   DIR/v2/oci   its next version: one small package newer, one source file
#                changed; the base layer is the same, the others are new blobs
#
# Newer wheels of PyTorch for this processor depend on several GB of CUDA
# libraries that have to be there for an import; the ones up to 1.12 stand
# alone. Python 3.9 is the newest that both they and a Debian release have.
set -eu
dir=$1
suite=bullseye python=3.9
[ ! -e "$dir/v2/oci/index.json" ] || exit 0
mkdir -p "$dir"
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
root=$work/root site=usr/local/lib/python$python/dist-packages

packages() { # VERSION of the small package: the pip packages, with the machine's own pip configuration
	python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
		--no-compile --upgrade --target "$root/$site" --implementation cp --python-version "$python" \
		--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --only-binary=:all: \
		torch==1.12.1 numpy==1.23.5 sympy==1.12 networkx==3.1 "typing-extensions==$1"
	chroot "$root" python3 -m compileall -q -j 0 "/$site" >/dev/null || : # some packages ship templates that do not compile
}

program() { # WORD: the program
	mkdir -p "$root/srv/app"
	cat >"$root/srv/app/main.py" <<-PY
		"""Adds what it is given, on the processor."""
		import sys
		import torch

		WORD = "$1"

		def total(values):
		    return torch.tensor(values).sum()

		if __name__ == "__main__":
		    print(WORD, total([float(v) for v in sys.argv[1:]]))
	PY
}

pack() { # FILE PATH…: a layer of what is at the paths
	file=$1
	shift
	tar --create --file "$file" --directory "$root" --sort=name --numeric-owner --format=pax \
		--pax-option=delete=atime,delete=ctime --xattrs "$@"
}

image() { # LAYOUT LAYER…
	oci=$1
	shift
	umoci init --layout "$oci"
	umoci new --image "$oci:latest"
	for layer; do umoci raw add-layer --image "$oci:latest" "$layer"; done
	umoci config --image "$oci:latest" --config.entrypoint python3 \
		--config.cmd=-c --config.cmd='import torch; print(torch.ones(2).sum())' \
		--config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
	umoci gc --layout "$oci"
}

echo "making a Debian root file system (once; kept in $dir)"
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
mmdebstrap --quiet --variant=minbase --include=python3,ca-certificates --format=tar \
	"$suite" "$work/base.tar" "deb $mirror $suite main"
mkdir "$root"
tar --extract --file "$work/base.tar" --directory "$root" --numeric-owner --xattrs --xattrs-include='*'

echo "adding PyTorch from the package index"
packages 4.3.0
program ones
pack "$work/packages1.tar" "$site"
pack "$work/program1.tar" srv
chroot "$root" python3 -c 'import torch; assert torch.ones(2).sum() == 2' # the image is to work

echo "and the next version of it"
packages 4.7.1
program units
pack "$work/packages2.tar" "$site"
pack "$work/program2.tar" srv

for v in 1 2; do
	image "$work/oci$v" "$work/base.tar" "$work/packages$v.tar" "$work/program$v.tar"
done
for v in 1 2; do
	mkdir -p "$dir/v$v"
	mv "$work/oci$v" "$dir/v$v/oci"
done
