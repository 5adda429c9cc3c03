// Package image makes an Image of a reference: it asks a registry for the
// manifest, chooses the platform, reads the config, and checks digests, sizes
// and bounds on the way. What it returns is consistent: every layer has a
// valid digest and a diffID. It reads no layers and does not judge their media
// types; rootfs/layer does.
package image
