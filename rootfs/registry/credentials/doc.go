// Package credentials finds what to present to registries, in the places where
// users have it: Docker's config.json with its credential helpers, and pull secrets
// that are mounted as files. Package kube adds the other places of a Kubernetes node.
// The first that has something for a repository counts; a source that fails does not
// hide the next one.
//
// Everything is looked up when a token is needed, so what was rotated on disk
// counts at the next one, and nothing has to be watched.
//
// Secrets are in no error and no log record. What helpers print on their error
// output or instead of an answer may hold some, so it is not passed on.
package credentials
