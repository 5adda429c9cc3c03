#!/bin/sh
# What `make run` does: makes a real image (or takes IMAGE), puts it unchanged
# in a local registry, and starts it in a virtual machine three ways over a
# shaped link. The arguments replace the image's command.
set -eu
here=$(dirname "$0")
cache=${CACHE:?}
# shellcheck source=tools/demo/registry.sh
. "$here/registry.sh"
trap stop_registry EXIT
trap 'exit 130' INT TERM

if [ -n "${IMAGE:-}" ]; then
	from=docker://$IMAGE name=$(echo "${IMAGE%%@*}" | sed 's#^[^/]*[.:][^/]*/##; s#:[^/]*$##')
else
	"$here/image.sh" "$cache/image"
	from=oci:$cache/image/oci:latest name=demo/python
fi
start_registry "$cache/registry"
echo "copying the image, unchanged, to a registry at $REGISTRY"
skopeo copy --quiet --preserve-digests --dest-tls-verify=false \
	${SKOPEO_ARGS:-} "$from" "docker://$REGISTRY/$name:run"

[ $# = 0 ] || set -- -- "$@"
echo "starting it three ways over 1 Gbit/s and 5 ms"
"$here/../../bin/tatami" bench start --link "${LINK:-1gbit,5ms}" --rounds "${ROUNDS:-1}" "$REGISTRY/$name:run" "$@"
