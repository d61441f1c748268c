package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

const (
	// takeoverTime bounds the handing over: what hangs then is broken.
	takeoverTime = 30 * time.Second
	// adopters is how many containers are handed over at a time.
	adopters = 8
	// askAtOnce is how many containers are asked for in one request.
	askAtOnce = 64
)

// takeOver makes sure, before anybody else speaks over a new connection, that the
// supervisor has what we hold and we hold what it has. A supervisor that has lost
// nothing, and one that is older than this, costs a question.
func (c *Client) takeOver(ctx context.Context, l *link) error {
	if l.who.Version < wire.VersionTakeover {
		for _, k := range c.held.following() { // it tells a former connection
			c.held.execLost(k)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, takeoverTime)
	defer cancel()
	known := map[id.Container]bool{}
	var list wire.ListReply
	if err := l.plain(ctx, wire.OpList, nil, &list); err != nil {
		return err
	}
	for _, i := range list.Containers {
		known[i.ID] = true
		if i.Exit != nil {
			c.held.exited(*i.Exit) // while there was no connection
		}
	}
	var lost, ask []id.Container
	held := map[id.Container]bool{}
	for _, n := range c.held.starts() {
		held[n] = true
		if !known[n] {
			lost = append(lost, n)
		}
	}
	for n := range known {
		if !held[n] {
			ask = append(ask, n)
		}
	}
	for _, step := range []func() error{
		func() error { return c.syncLanes(ctx, l) },
		func() error { return c.keepAgain(ctx, l) },
		func() error { return c.handOver(ctx, l, lost) },
		func() error { return l.plain(ctx, wire.OpSettled, nil, nil) },
		func() error { return c.hold(ctx, l, ask) },
		func() error { return c.follow(ctx, l) },
		func() error { return c.upgrade(ctx, l) },
	} {
		// What one side has no room for, say, costs some safety and not the service.
		if err := step(); broken(err) {
			return err
		}
	}
	return nil
}

// upgrade asks a supervisor of another build to become ours. It comes last: should
// the new program not start, we hold what the next one needs. Whether it has become
// another shows in a connection that breaks; if it has not, it goes on as it is.
func (c *Client) upgrade(ctx context.Context, l *link) error {
	if c.cfg.Build == "" || c.cfg.Binary == "" || l.who.Build == c.cfg.Build || l.who.Build == c.asked {
		return nil
	}
	c.asked = l.who.Build
	err := l.plain(ctx, wire.OpUpgrade, wire.Upgrade{Binary: c.cfg.Binary}, nil)
	if errdefs.IsUnavailable(err) && !broken(err) { // now
		c.asked = ""
	}
	return err
}

// plain is a request without descriptors.
func (l *link) plain(ctx context.Context, op wire.Op, body, reply any) error {
	got, err := l.call(ctx, op, body, reply, nil)
	wire.CloseFiles(got)
	return err
}

// broken tells whether nothing more can be asked over this connection.
func broken(err error) bool {
	return errors.Is(err, wire.ErrBroken) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// handOver gives containers to the supervisor. It refuses what it cannot go on
// with; the daemon finds that out when it compares.
func (c *Client) handOver(ctx context.Context, l *link, lost []id.Container) error {
	if len(lost) == 0 {
		return nil
	}
	for _, p := range c.held.profileTexts() { // once, and not with each container
		if err := l.plain(ctx, wire.OpProfile, p, nil); broken(err) {
			return err
		}
	}
	queue := make(chan id.Container, len(lost))
	for _, n := range lost {
		queue <- n
	}
	close(queue)
	errs := make([]error, adopters)
	var wg sync.WaitGroup
	for i := range adopters {
		wg.Go(func() {
			for n := range queue {
				h, files, ok := c.held.handOver(n)
				if !ok {
					continue
				}
				got, err := l.call(ctx, wire.OpAdopt, h, nil, nil, files...)
				wire.CloseFiles(got)
				if errors.Is(err, wire.ErrUnknownProfile) { // more of them than it keeps
					h.Profile = c.held.profileOf(n)
					got, err = l.call(ctx, wire.OpAdopt, h, nil, nil, files...)
					wire.CloseFiles(got)
				}
				wire.CloseFiles(files)
				if broken(err) {
					errs[i] = err
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// hold asks for what is to be held of containers.
func (c *Client) hold(ctx context.Context, l *link, ask []id.Container) error {
	for len(ask) > 0 {
		n := min(len(ask), askAtOnce)
		var reply wire.HoldingsReply
		files, err := l.call(ctx, wire.OpHoldings, wire.Holdings{IDs: ask[:n]}, &reply, c.keepHoldings)
		wire.CloseFiles(files)
		if err != nil {
			return err
		}
		if reply.Done < 1 || reply.Done > n {
			return fmt.Errorf("%s: %d of %d answered: %w", wire.OpHoldings, reply.Done, n, wire.ErrProtocol)
		}
		ask = ask[reply.Done:]
	}
	return nil
}

// keepHoldings holds what an answer to OpHoldings brings.
func (c *Client) keepHoldings(f wire.Frame, files []*os.File) {
	var reply wire.HoldingsReply
	if json.Unmarshal(f.Body, &reply) != nil {
		return
	}
	for _, h := range reply.Holdings {
		if len(h.Files) > len(files) {
			return
		}
		var digest struct {
			Seccomp string `json:"seccomp"`
		}
		if h.Op == wire.OpCreateProfile {
			_ = json.Unmarshal(h.Create, &digest) // an empty one is refused when it is handed over
		}
		c.held.put(h, digest.Seccomp, files[:len(h.Files)])
		files = files[len(h.Files):]
	}
}

// keepLanes holds the lanes that the supervisor names.
func (c *Client) keepLanes(f wire.Frame, files []*os.File) {
	var r wire.LanesReply
	if json.Unmarshal(f.Body, &r) == nil {
		c.held.addLanes(r.IDs, files)
	}
}

// syncLanes holds the lanes that the supervisor has, or gives those that we hold
// to one that has none.
func (c *Client) syncLanes(ctx context.Context, l *link) error {
	for got := 0; ; {
		var reply wire.LanesReply
		files, err := l.call(ctx, wire.OpLanes, wire.Lanes{From: got}, &reply, c.keepLanes)
		wire.CloseFiles(files)
		if err != nil {
			return err
		}
		if reply.Total == 0 {
			break
		}
		if got += len(reply.IDs); len(reply.IDs) == 0 || got >= reply.Total {
			return nil
		}
	}
	for _, n := range c.held.heldLanes() {
		files, ok := c.held.lane(n)
		if !ok {
			continue
		}
		got, err := l.call(ctx, wire.OpPutLanes, nil, nil, nil, files...)
		wire.CloseFiles(got)
		wire.CloseFiles(files)
		if broken(err) {
			return err
		}
	}
	return nil
}

// keepAgain gives a supervisor the descriptors that it should keep and does not.
func (c *Client) keepAgain(ctx context.Context, l *link) error {
	c.mu.Lock()
	kept := c.kept
	c.mu.Unlock()
	if kept == nil {
		return nil
	}
	var list wire.ListFDReply
	if err := l.plain(ctx, wire.OpListFD, nil, &list); err != nil {
		return err
	}
	have := map[string]bool{}
	for _, k := range list.Keys {
		have[k] = true
	}
	var fault error
	kept(func(keys []string, files []*os.File) {
		if fault != nil || len(keys) == 0 || have[keys[0]] { // a group is put at once
			return
		}
		got, err := l.call(ctx, wire.OpPutFD, wire.Keys{Keys: keys}, nil, nil, files...)
		wire.CloseFiles(got)
		if broken(err) { // and not of files that were closed meanwhile
			fault = err
		}
	})
	return fault
}

// follow asks for the exits of the execs that run.
func (c *Client) follow(ctx context.Context, l *link) error {
	for _, k := range c.held.following() {
		r, files, ok := c.held.follow(k)
		if !ok { // started by an older supervisor
			c.held.execLost(k)
			continue
		}
		got, err := l.call(ctx, wire.OpFollow, r, nil, nil, files...)
		wire.CloseFiles(got)
		wire.CloseFiles(files)
		if broken(err) {
			return err
		}
		if err != nil {
			c.held.execLost(k)
		}
	}
	return nil
}
