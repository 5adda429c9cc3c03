// Package registrytest is an OCI registry in the process of a test or a
// benchmark: real HTTP over a real socket, with content that is built here,
// faults on demand and counters of what was asked and sent.
//
//	reg := registrytest.Start(t, registrytest.Options{})
//	tar := registrytest.Must(registrytest.Tar(registrytest.File("etc/motd", 0o644, "hello")))
//	img := reg.PushImage("library/x", "latest", registrytest.Image{
//		Layers: []registrytest.Layer{registrytest.Must(registrytest.Gzip(tar))},
//	})
//	reg.Fault("/blobs/", 2, registrytest.Truncate(100)) // the next two blob requests
//	... reg.Host()+"/library/x:latest" ...
//	reg.BlobStats(img.Layers[0].Digest).Bytes
//
// Tests push by its methods or, as any client, over the wire.
package registrytest
