package main

import (
	"cmp"
	"context"
	"slices"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type imageRow struct {
	ID      string   `json:"id"`
	Tags    []string `json:"tags"`
	Digests []string `json:"digests"`
	Size    uint64   `json:"size"`
	Pinned  bool     `json:"pinned"`
}

func imagesCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "images [IMAGE]",
		Short: "List images",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref := ""
			if len(args) == 1 {
				ref = args[0]
			}
			list, err := e.listImages(cmd.Context(), ref)
			if err != nil {
				return err
			}
			if done, err := e.print(list); done {
				return err
			}
			return table(e.out, imagesTable(list))
		},
	}
}

func (e *env) listImages(ctx context.Context, ref string) ([]imageRow, error) {
	req := &runtimeapi.ListImagesRequest{}
	if ref != "" {
		req.Filter = &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: ref}}
	}
	r, err := e.images().ListImages(ctx, req)
	if err != nil {
		return nil, err
	}
	out := []imageRow{}
	for _, i := range r.Images {
		out = append(out, imageRow{ID: i.Id, Tags: append([]string{}, i.RepoTags...), Digests: append([]string{}, i.RepoDigests...), Size: i.Size, Pinned: i.Pinned})
	}
	slices.SortFunc(out, func(a, b imageRow) int { return cmp.Or(cmp.Compare(a.name(), b.name()), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// name is the first name of an image, for order.
func (r imageRow) name() string {
	if n := slices.Concat(r.Tags, r.Digests); len(n) > 0 {
		return n[0]
	}
	return ""
}

// imagesTable has a row for each tag; an image without one shows its digests.
func imagesTable(list []imageRow) [][]string {
	rows := [][]string{{"IMAGE", "ID", "SIZE"}}
	for _, i := range list {
		names := i.Tags
		if len(names) == 0 {
			names = i.Digests
		}
		if len(names) == 0 {
			names = []string{"-"}
		}
		for _, n := range names {
			rows = append(rows, []string{n, short(i.ID), size(i.Size)})
		}
	}
	return rows
}
