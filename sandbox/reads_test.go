package sandbox

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// TestReadsNeverWait holds every lock and slot that operations take, and asks
// everything that kubelets ask all the time.
func TestReadsNeverWait(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	running, created := k.running(p, "running"), k.ctr(p, "created")
	var release []func()
	hold := func(lock interface {
		Lock()
		Unlock()
	}) {
		done := make(chan struct{})
		held := make(chan struct{})
		// A goroutine each: the order does not matter to who holds only one.
		go func() {
			lock.Lock()
			close(held)
			<-done
			lock.Unlock()
		}()
		<-held
		release = append(release, func() { close(done) })
	}
	v := k.view.Load()
	for _, q := range v.pods {
		hold(&q.mu)
		release = append(release, q.slot.seize())
	}
	for _, c := range v.containers {
		hold(&c.mu)
		hold(&c.ending.mu)
		release = append(release, c.slot.seize())
	}
	hold(&k.mu)
	hold(&k.ops.mu)
	defer func() {
		for _, f := range release {
			f()
		}
	}()
	ctx := context.Background()
	for name, ask := range map[string]func() error{
		"ListPods": func() error {
			if n := len(k.ListPods(PodFilter{})); n != 1 {
				return fmt.Errorf("%d pods", n)
			}
			return nil
		},
		"Pod":         func() error { _, err := k.Pod(string(p)); return err },
		"Pod by name": func() error { _, err := k.Pod(string(p[:20])); return err },
		"ListContainers": func() error {
			if n := len(k.ListContainers(ContainerFilter{Pod: string(p)})); n != 2 {
				return fmt.Errorf("%d containers", n)
			}
			return nil
		},
		"Container":          func() error { _, err := k.Container(string(created)); return err },
		"ListContainerStats": func() error { _, err := k.ListContainerStats(ctx, ContainerFilter{}); return err },
		"ContainerStats":     func() error { _, _ = k.ContainerStats(ctx, string(running)); return nil }, // it has no cgroup
		"WritableUsage":      func() error { _ = k.WritableUsage(); return nil },
		"Ready":              func() error { _ = k.UserNamespaces(); return k.Ready() },
	} {
		answered := make(chan error, 1)
		go func() { answered <- ask() }()
		select {
		case err := <-answered:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s waits for an operation", name)
		}
	}
}
