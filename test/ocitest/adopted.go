package ocitest

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci"
)

// RunAdopted is Run with each container given up by the runtime once it is
// started, and adopted as the next supervisor adopts it: an adopted container does
// all that another one does.
func RunAdopted(t *testing.T, open func(t *testing.T) oci.Runtime) {
	Run(t, func(t *testing.T) oci.Runtime { return &adopting{open(t)} })
}

type adopting struct{ oci.Runtime }

func (a *adopting) Create(ctx context.Context, r oci.CreateRequest) (oci.Container, error) {
	c, err := a.Runtime.Create(ctx, r)
	if err != nil {
		return nil, err
	}
	w := &adopted{maker: c, request: r, by: a.Runtime.(oci.Adopter)}
	w.now.Store(&c)
	return w, nil
}

// adopted is a container that changes hands at its start.
type adopted struct {
	maker   oci.Container
	request oci.CreateRequest
	by      oci.Adopter
	now     atomic.Pointer[oci.Container]
}

func (a *adopted) container() oci.Container { return *a.now.Load() }

func (a *adopted) Start(ctx context.Context, s oci.Stdio) (oci.Process, error) {
	p, err := a.maker.Start(ctx, s)
	if err != nil {
		return p, err
	}
	saved, files, err := a.maker.(oci.Heritable).Bequeath()
	if err != nil {
		return p, err
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	r := a.request
	r.MountFDs, r.Namespaces = nil, map[specs.LinuxNamespaceType]*os.File{}
	for kind := range a.request.Namespaces {
		r.Namespaces[kind] = nil
	}
	c, err := a.by.Adopt(ctx, oci.Heritage{Request: r, Pid: p.Pid, PidFD: p.PidFD, Saved: saved, Files: files})
	if err == nil {
		a.now.Store(&c)
	}
	return p, err
}

func (a *adopted) Exec(ctx context.Context, p *specs.Process, s oci.Stdio) (oci.Process, error) {
	return a.container().Exec(ctx, p, s)
}

func (a *adopted) KillAll() error                       { return a.container().KillAll() }
func (a *adopted) OOMKills() (uint64, error)            { return a.container().OOMKills() }
func (a *adopted) Update(r *specs.LinuxResources) error { return a.container().Update(r) }
func (a *adopted) Pause() error                         { return a.container().Pause() }
func (a *adopted) Resume() error                        { return a.container().Resume() }

// Delete also lets the maker close what it still has, as the end of its process
// would.
func (a *adopted) Delete() error { return errors.Join(a.container().Delete(), a.maker.Delete()) }
