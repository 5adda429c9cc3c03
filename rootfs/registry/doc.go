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
// Tokens are fetched by oras-go's auth client. It refuses a token service at a
// private address unless that has the host name of the registry itself.
//
// Secrets (credentials, tokens, the query of a signed URL) never reach an
// error or a log record.
//
// Locks (tokenCache.mu, targets.mu, hosts.mu) are leaves: none is held while
// another is taken or while waiting.
package registry
