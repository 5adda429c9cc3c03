// Package nydus makes a layer out of a Nydus image.
package nydus
