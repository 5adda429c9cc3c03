// Package tarball turns the tar stream of a layer into entries, and the
// contents of its files into a segment.
//
// It has a tar reader of its own because archive/tar hides what a segment
// needs: where in the stream a file's bytes are, and which parts of a sparse
// file are holes. It reads what archive/tar reads (v7, ustar, pax, GNU and star
// headers, and all four ways to write sparse files) and means the same by it.
// Global pax headers are skipped, as by the runtimes that unpack layers.
//
// Entries are checked as hostile: names that leave the layer, numbers out of
// range, and more names or attributes than memory should hold are errors.
package tarball
