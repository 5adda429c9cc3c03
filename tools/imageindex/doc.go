// Package imageindex makes and publishes index artifacts of images: what a node
// learns of a layer when it streams it for the first time, made once, so that no
// node has to. The image stays as it is. What an artifact is, package artifact
// says.
package imageindex
