package main

import (
	"context"
	"encoding/json"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func inspectCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect ID|NAME",
		Short: "Print all that is known of a pod, container or image as JSON",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := e.everything(cmd.Context())
			if err != nil {
				return err
			}
			o, err := find(args[0], all)
			if err != nil {
				return err
			}
			doc, err := e.describe(cmd.Context(), o)
			if err != nil {
				return err
			}
			enc := json.NewEncoder(e.out)
			enc.SetIndent("", "  ")
			return enc.Encode(doc)
		},
	}
}

// describe is the status as CRI gives it, with the verbose information, which
// is JSON in strings, unpacked.
func (e *env) describe(ctx context.Context, o object) (map[string]any, error) {
	var st proto.Message
	var info map[string]string
	switch o.kind {
	case "pod":
		r, err := e.runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: o.id, Verbose: true})
		if err != nil {
			return nil, err
		}
		st, info = r.Status, r.Info
	case "container":
		r, err := e.runtime().ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: o.id, Verbose: true})
		if err != nil {
			return nil, err
		}
		st, info = r.Status, r.Info
	default:
		r, err := e.images().ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: o.id}, Verbose: true})
		if err != nil {
			return nil, err
		}
		st, info = r.Image, r.Info
	}
	b, err := protojson.Marshal(st)
	if err != nil {
		return nil, err
	}
	doc := map[string]any{"kind": o.kind, "status": json.RawMessage(b)}
	for k, v := range info {
		if json.Valid([]byte(v)) {
			doc[k] = json.RawMessage(v)
		} else {
			doc[k] = v
		}
	}
	return doc, nil
}
