// Package torture has layers with everything that makes merging and writing a
// container's file tree hard, a plain reference unpacker that puts them into
// overlayfs directories with the means of the operating system alone, and the
// mounts to look at both. For tests; unpacking and mounting need root.
package torture
