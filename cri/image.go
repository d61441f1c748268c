package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cri/convert"
	"github.com/berth-runtime/berth/imageservice"
)

// ListImages lists images, one entry for each image id.
func (s *imageServer) ListImages(_ context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	list := s.images.List(r.GetFilter().GetImage().GetImage())
	out := &runtimeapi.ListImagesResponse{Images: make([]*runtimeapi.Image, len(list))}
	for i, img := range list {
		out.Images[i] = convert.Image(img)
	}
	return out, nil
}

// ImageStatus describes one image; a missing one is no error but no image.
func (s *imageServer) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	ref := r.GetImage().GetImage()
	if ref == "" {
		return nil, convert.Required("image.image")
	}
	img, err := s.images.Status(ref)
	if err != nil || img == nil {
		return &runtimeapi.ImageStatusResponse{}, err
	}
	out := &runtimeapi.ImageStatusResponse{Image: convert.Image(img)}
	if r.Verbose {
		out.Info, err = info(imageInfo{ID: img.ID.String(), ImageSpec: img.Config, Layers: len(img.Layers)})
	}
	return out, err
}

// imageInfo is what a verbose ImageStatus adds; crictl reads imageSpec.
type imageInfo struct {
	ID        string `json:"id"`
	ImageSpec any    `json:"imageSpec"`
	Layers    int    `json:"layers"`
}

// PullImage pulls an image, also when it is here already: the kubelet uses a
// pull to check that a pod's credentials may have the image.
func (s *imageServer) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref := r.GetImage().GetImage()
	if ref == "" {
		return nil, convert.Required("image.image")
	}
	img, err := s.images.Pull(ctx, imageservice.PullRequest{Ref: ref, Auth: convert.Auth(r.Auth)})
	if err != nil {
		return nil, pullError(err)
	}
	return &runtimeapi.PullImageResponse{ImageRef: img.ID.String()}, nil
}

// RemoveImage removes an image with all its names; missing is success.
func (s *imageServer) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	ref := r.GetImage().GetImage()
	if ref == "" {
		return nil, convert.Required("image.image")
	}
	if err := s.images.Remove(ctx, ref); err != nil {
		return nil, err
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}

// ImageFsInfo tells what images and writable layers take.
func (s *imageServer) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems:     []*runtimeapi.FilesystemUsage{convert.FsUsage(s.images.FsUsage())},
		ContainerFilesystems: []*runtimeapi.FilesystemUsage{convert.FsUsage(s.stats.WritableUsage())},
	}, nil
}
