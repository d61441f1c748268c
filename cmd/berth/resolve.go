package main

import (
	"context"
	"fmt"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// object is something that a person named.
type object struct {
	kind  string // "container", "pod" or "image"
	id    string
	label string // how to name it without doubt
	names []string
	dead  bool // yields to one that lives when a name fits both
}

// find resolves ref among objects: a full id, a unique prefix of one, or a name.
// A name fits before a prefix; among attempts of one name, the one that lives.
func find(ref string, all []object) (object, error) {
	var named, prefixed []object
	for _, o := range all {
		id := strings.TrimPrefix(o.id, "sha256:")
		switch {
		case ref == o.id || ref == id:
			return o, nil
		case hasName(o, ref):
			named = append(named, o)
		case len(ref) >= 3 && strings.HasPrefix(id, strings.TrimPrefix(ref, "sha256:")):
			prefixed = append(prefixed, o)
		}
	}
	if len(named) == 0 {
		named = prefixed
	}
	if living := filter(named, func(o object) bool { return !o.dead }); len(named) > 1 && len(living) == 1 {
		return living[0], nil
	}
	switch len(named) {
	case 0:
		return object{}, fmt.Errorf("%q: no such object; see berth ps --all and berth images", ref)
	case 1:
		return named[0], nil
	}
	var b strings.Builder
	for _, o := range named {
		fmt.Fprintf(&b, "\n  %s %s  %s", o.kind, short(o.id), o.label)
	}
	return object{}, fmt.Errorf("%q fits several objects; name one by its id:%s", ref, b.String())
}

func hasName(o object, ref string) bool {
	for _, n := range o.names {
		if n == ref {
			return true
		}
	}
	return false
}

func filter(in []object, keep func(object) bool) []object {
	var out []object
	for _, o := range in {
		if keep(o) {
			out = append(out, o)
		}
	}
	return out
}

// containers are all containers by id, name, pod/name and namespace/pod/name.
func (e *env) containers(ctx context.Context) ([]object, error) {
	pods, err := e.podMetadata(ctx)
	if err != nil {
		return nil, err
	}
	r, err := e.runtime().ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	var out []object
	for _, c := range r.Containers {
		n := c.Metadata.GetName()
		o := object{kind: "container", id: c.Id, label: n, names: []string{n}, dead: c.State != runtimeapi.ContainerState_CONTAINER_RUNNING}
		if m := pods[c.PodSandboxId]; m != nil {
			o.label = m.Namespace + "/" + m.Name + "/" + n
			o.names = append(o.names, m.Name+"/"+n, o.label)
		}
		out = append(out, o)
	}
	return out, nil
}

func (e *env) podMetadata(ctx context.Context) (map[string]*runtimeapi.PodSandboxMetadata, error) {
	r, err := e.runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	out := map[string]*runtimeapi.PodSandboxMetadata{}
	for _, p := range r.Items {
		out[p.Id] = p.Metadata
	}
	return out, nil
}

// everything is all pods, containers and images.
func (e *env) everything(ctx context.Context) ([]object, error) {
	out, err := e.containers(ctx)
	if err != nil {
		return nil, err
	}
	pods, err := e.runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	for _, p := range pods.Items {
		label := p.Metadata.GetNamespace() + "/" + p.Metadata.GetName()
		out = append(out, object{kind: "pod", id: p.Id, label: label, names: []string{p.Metadata.GetName(), label},
			dead: p.State != runtimeapi.PodSandboxState_SANDBOX_READY})
	}
	images, err := e.images().ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return nil, err
	}
	for _, i := range images.Images {
		o := object{kind: "image", id: i.Id, label: strings.Join(i.RepoTags, " ")}
		for _, n := range append(append([]string{}, i.RepoTags...), i.RepoDigests...) {
			familiar := strings.TrimPrefix(strings.TrimPrefix(n, "docker.io/"), "library/")
			o.names = append(o.names, n, familiar, strings.TrimSuffix(familiar, ":latest"))
		}
		out = append(out, o)
	}
	return out, nil
}
