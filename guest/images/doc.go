// Package images finds out what a container shall run: it asks the node which
// manifest is pinned for the container, reads manifest, configuration and index
// over the relay in one exchange, checks each against what names it, and says
// where the bytes come from. Without a node it asks the registry.
//
// What the node says about content is believed only as far as trust goes:
//
//	host   the index that the node built for the pinned manifest, or the image
//	       file that it shows for it over virtio-fs
//	image  only what the manifest itself binds: the table of contents of an
//	       eStargz layer; the guest makes the index from it
//
// An image that cannot be served lazily under these rules comes out without an
// index, with the reason: it can be unpacked, which verifies whole layers.
package images
