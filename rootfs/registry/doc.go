// Package registry is the client of the OCI distribution API. The same client
// talks to a registry, to a mirror and to the relay of the host: it resolves
// references, reads manifests and small blobs, lists referrers and reads
// ranges of blobs and segments, many at a time; and it pushes blobs and manifests.
//
// It knows nothing of images, layers or the store. Manifests and small blobs
// are checked against their digests here; ranges and streams are checked for
// their length only, and whoever reads them verifies the content.
//
// Failures that may pass (a lost connection, a body that ends early or stands
// still, 429 and 5xx answers) are tried again here, a bounded number of times;
// what comes out as an error is final for this registry. Errors are *Error
// with a class of github.com/containerd/errdefs. A context that ends is
// reported as the context's own error.
//
// A host that refuses requests (429, 503) gets a pause from all of them, as long as
// it asks for (30 s at most; a longer one fails what would have to wait), and then
// fewer requests a second until it takes more (pacer). A whole blob is fetched in
// as many ranges at the same time as make it faster (window), over several
// connections also with HTTP/2 (lanes). An answer that stands still for several
// times as long as is usual for its host is asked for a second time, of the next
// host or over another connection, and the first byte wins (hedge); second requests
// are few, and none go to a host that refuses some. pacer, window and patience only
// decide: they have no clock, no lock and do no I/O.
//
// With a scheduler (Config.Sched) requests and bytes wait for their turn: a request takes
// one of those that its host has (every hop of a redirect one of its own) until its answer
// has been read, and each Read of a body is allowed before it is made. The work is that of
// the context. No clock runs meanwhile: neither that of stalls nor that of second requests.
// Those that a host has refused wait in the same order for the pauses between requests.
//
// Ranges are not verified here, but whoever finds them wrong can say so (Trail):
// a mirror that gave them is left alone for that repository, and the next host asked.
//
// A registry may have mirrors (Config.Hosts; package hosts reads containerd's
// hosts.toml). They are asked first, in their order, for what they are trusted
// with; whatever fails there is asked of the next host, from the byte on at which
// it failed, and a mirror that is down is left alone for a while.
//
// Tokens are fetched by oras-go's auth client, and renewed before they end. It refuses a token service at a
// private address unless that has the host name of the registry itself.
//
// Secrets (credentials, tokens, headers of hosts, the query of a signed URL)
// never reach an error or a log record, nor another host than theirs.
//
// Locks are leaves (tokenCache.mu, targets.mu, hosts.mu, links.mu, peers.mu, peer.mu,
// lanes.mu, Trail.mu): none is held while another is taken or while waiting. Only
// hedge.mu is held while others of these are.
package registry
