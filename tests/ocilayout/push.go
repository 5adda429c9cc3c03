package ocilayout

import (
	"context"
	"fmt"

	oras "oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"
)

// Push copies the image as it is, whatever the media types of its layers, to a
// registry without TLS: repository is "host:port/name". Foreign layers are
// left out.
func (d Dir) Push(ctx context.Context, repository, tag string) error {
	from, err := oci.NewWithContext(ctx, string(d))
	if err != nil {
		return fmt.Errorf("open layout %s: %w", d, err)
	}
	to, err := remote.NewRepository(repository)
	if err != nil {
		return err
	}
	to.PlainHTTP = true
	if _, err := oras.Copy(ctx, from, Tag, to, tag, oras.DefaultCopyOptions); err != nil {
		return fmt.Errorf("push %s: %w", d, err)
	}
	return nil
}
