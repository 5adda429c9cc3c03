// Package hostimages fills a virtiofs.Directory with the images that tatami-host
// grants a sandbox. Bytes that the node has are read from its files by this
// process, from descriptors that tatami-host gave it (package shared); what is
// missing is asked for, over one connection (package sharedimages).
//
// The connection may be lost at any time: tatami-host is upgraded, or killed. What
// the node has stays readable meanwhile; a read of what is missing waits up to
// Config.Patience for another connection, on which every image has to be granted
// again, and be the same.
//
// An image whose container is gone stays until nobody has read it for a while; then
// its name vanishes, and a guest that asks for it makes tatami-host be asked again.
//
// Lock order: Client.mu, link.mu. Nothing is waited for under them.
package hostimages
