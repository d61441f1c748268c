package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// profileVersion is the first protocol version with profiles by digest.
const profileVersion = 2

// Create makes a container. The same request again, after a lost answer, succeeds.
// A handler that is an external runtime gets its command line here.
//
// The seccomp profile is most of a spec's text and the same for nearly all
// containers: it is sent once to each supervisor and named by its digest
// afterwards.
func (c *Client) Create(ctx context.Context, r wire.Create) error {
	if r.Spec != nil && r.Env == nil {
		r.Env = rawEnv(r.Spec.Process)
	}
	if cmd, ok := c.cfg.Commands[r.Handler]; ok && !r.PodInit {
		r.Command = &cmd
		l, err := c.wait(ctx)
		if err != nil {
			return err
		}
		if l.who.Version < wire.VersionCommand {
			return fmt.Errorf("handler %q: the running supervisor (%s, pid %d) is older than external runtimes; remove the pods of this node, it ends and a new one takes over: %w",
				r.Handler, l.who.Build, l.who.Pid, errdefs.ErrFailedPrecondition)
		}
	}
	if r.Spec == nil || r.Spec.Linux == nil || r.Spec.Linux.Seccomp == nil {
		return c.create(ctx, wire.OpCreate, r, nil)
	}
	short, profile, err := split(r)
	if err != nil {
		return err
	}
	// A supervisor may come and go, or be short of room, between two requests.
	for range 3 {
		l, err := c.wait(ctx)
		if err != nil {
			return err
		}
		if l.who.Version < profileVersion || len(profile.Text) > wire.MaxProfile {
			break
		}
		if err = c.create(ctx, wire.OpCreateProfile, short, profile.Text); !errors.Is(err, wire.ErrUnknownProfile) {
			return err
		}
		if err = c.plain(ctx, wire.OpProfile, profile); err != nil {
			return err
		}
	}
	return c.create(ctx, wire.OpCreate, r, nil)
}

// create sends a request, and keeps it for as long as the container is there.
func (c *Client) create(ctx context.Context, op wire.Op, r wire.Create, profile json.RawMessage) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", op, err, errdefs.ErrInvalidArgument)
	}
	c.held.request(r.ID, op, text, r.Seccomp, profile)
	return c.plain(ctx, op, json.RawMessage(text))
}

// split takes the profile out of a request, whose spec stays as it is.
func split(r wire.Create) (wire.Create, wire.Profile, error) {
	text, err := json.Marshal(r.Spec.Linux.Seccomp)
	if err != nil {
		return r, wire.Profile{}, fmt.Errorf("linux.seccomp: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	sum := sha256.Sum256(text)
	s, l := *r.Spec, *r.Spec.Linux
	l.Seccomp, s.Linux = nil, &l
	r.Spec, r.Seccomp = &s, hex.EncodeToString(sum[:])
	return r, wire.Profile{Digest: r.Seccomp, Text: text}, nil
}
