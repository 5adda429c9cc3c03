package service

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Mounting is what PullImage needs of the Guest service.
type Mounting interface {
	Mount(ctx context.Context, req *api.MountRequest) (*api.MountResponse, error)
}

// CDH answers kata-agent where it expects a Confidential Data Hub. Images are
// ours; the rest goes to a real one, if there is one.
type CDH struct {
	Guest Mounting
	// Forward connects to the real Confidential Data Hub; nil has none.
	Forward func(ctx context.Context) (*ttrpc.Client, error)
}

// Register adds the four services that kata-agent calls to a server.
func (c *CDH) Register(s *ttrpc.Server) {
	cdh.RegisterImagePullServiceService(s, c)
	cdh.RegisterSealedSecretServiceService(s, c)
	cdh.RegisterSecureMountServiceService(s, c)
	cdh.RegisterGetResourceServiceService(s, c)
}

// PullImage returns when <bundle_path>/rootfs is a mount point. The agent makes
// the bundle path of the container's id (kata-containers: src/agent/src/
// confidential_data_hub/mod.rs) and passes on nothing else that names it.
func (c *CDH) PullImage(ctx context.Context, req *cdh.ImagePullRequest) (*cdh.ImagePullResponse, error) {
	bundle := filepath.Clean(req.BundlePath)
	id := filepath.Base(bundle)
	if !filepath.IsAbs(bundle) || id == "/" || req.ImageUrl == "" {
		return nil, fmt.Errorf("pull %q to %q: an image and an absolute bundle path are needed: %w", req.ImageUrl, req.BundlePath, errdefs.ErrInvalidArgument)
	}
	resp, err := c.Guest.Mount(ctx, &api.MountRequest{Id: id, Reference: req.ImageUrl, Target: filepath.Join(bundle, "rootfs")})
	if err != nil {
		return nil, err
	}
	return &cdh.ImagePullResponse{ManifestDigest: resp.ManifestDigest}, nil
}

// UnsealSecret is forwarded.
func (c *CDH) UnsealSecret(ctx context.Context, req *cdh.UnsealSecretInput) (resp *cdh.UnsealSecretOutput, err error) {
	err = c.forward(ctx, "UnsealSecret", func(cl *ttrpc.Client) error {
		resp, err = cdh.NewSealedSecretServiceClient(cl).UnsealSecret(ctx, req)
		return err
	})
	return resp, err
}

// SecureMount is forwarded.
func (c *CDH) SecureMount(ctx context.Context, req *cdh.SecureMountRequest) (resp *cdh.SecureMountResponse, err error) {
	err = c.forward(ctx, "SecureMount", func(cl *ttrpc.Client) error {
		resp, err = cdh.NewSecureMountServiceClient(cl).SecureMount(ctx, req)
		return err
	})
	return resp, err
}

// GetResource is forwarded.
func (c *CDH) GetResource(ctx context.Context, req *cdh.GetResourceRequest) (resp *cdh.GetResourceResponse, err error) {
	err = c.forward(ctx, "GetResource", func(cl *ttrpc.Client) error {
		resp, err = cdh.NewGetResourceServiceClient(cl).GetResource(ctx, req)
		return err
	})
	return resp, err
}

// forward makes one call on a connection of its own: these calls are rare, and
// the hub may start after us. Its statuses reach the agent as they are.
func (c *CDH) forward(ctx context.Context, method string, call func(*ttrpc.Client) error) error {
	if c.Forward == nil {
		return fmt.Errorf("%s: there is no Confidential Data Hub here: set cdh_forward to the socket of one: %w", method, errdefs.ErrNotImplemented)
	}
	cl, err := c.Forward(ctx)
	if err != nil {
		return fmt.Errorf("%s: reach the Confidential Data Hub (cdh_forward): %w", method, err)
	}
	defer cl.Close()
	return call(cl)
}
