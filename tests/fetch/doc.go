// Package fetch measures how rootfs/registry fetches: over links of some rate and
// round-trip time, and how many requests a cold start costs a registry.
package fetch
