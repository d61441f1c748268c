package supervisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

func frame(t *testing.T, op wire.Op, body any) wire.Frame {
	t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return wire.Frame{ID: 1, Op: op, Body: text}
}

func profileOf(text string) wire.Profile {
	sum := sha256.Sum256([]byte(text))
	return wire.Profile{Digest: hex.EncodeToString(sum[:]), Text: json.RawMessage(text)}
}

func TestProfilesAreBounded(t *testing.T) {
	var p profiles
	put := func(x wire.Profile) {
		t.Helper()
		if err := p.put(x); err != nil {
			t.Fatal(err)
		}
	}
	known := func(x wire.Profile) bool {
		r := wire.Create{Spec: &specs.Spec{Linux: &specs.Linux{}}, Seccomp: x.Digest}
		digest, err := p.fill(wire.OpCreateProfile, &r)
		if err != nil && !errors.Is(err, wire.ErrUnknownProfile) {
			t.Fatal(err)
		}
		if err == nil && (hex.EncodeToString(digest[:]) != x.Digest || r.Spec.Linux.Seccomp == nil) {
			t.Errorf("%x for %s", digest, x.Digest)
		}
		return err == nil
	}
	nth := func(i int, size int) wire.Profile {
		return profileOf(fmt.Sprintf(`{"defaultAction":"SCMP_ACT_ALLOW","listenerMetadata":"%d%s"}`, i, strings.Repeat("m", size)))
	}
	for i := range 3 * maxProfiles {
		put(nth(i, 0))
		put(nth(i, 0)) // again is nothing
		if !known(nth(i, 0)) {
			t.Fatalf("%d is not kept", i)
		}
	}
	if len(p.m) != maxProfiles || len(p.order) != maxProfiles || known(nth(2*maxProfiles-1, 0)) || !known(nth(2*maxProfiles, 0)) {
		t.Errorf("%d profiles, %d in order", len(p.m), len(p.order))
	}
	for i := range 20 {
		put(nth(i, wire.MaxProfile-100))
		sum := 0
		for _, x := range p.m {
			sum += x.size
		}
		if sum > maxProfileBytes || sum != p.bytes || len(p.m) != len(p.order) {
			t.Fatalf("%d bytes, %d counted, %d and %d profiles", sum, p.bytes, len(p.m), len(p.order))
		}
	}
}

func TestBadProfiles(t *testing.T) {
	var p profiles
	good := profileOf(`{"defaultAction":"SCMP_ACT_ALLOW"}`)
	for name, x := range map[string]wire.Profile{
		"digest of something else": {Digest: profileOf("{}").Digest, Text: good.Text},
		"no digest":                {Text: good.Text},
		"null":                     profileOf("null"),
		"not an object":            profileOf("[1]"),
		"too long":                 profileOf(`"` + strings.Repeat("x", wire.MaxProfile) + `"`),
	} {
		if err := p.put(x); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := p.put(good); err != nil {
		t.Fatal(err)
	}
	with := func(digest string, l *specs.Linux) *wire.Create {
		return &wire.Create{Spec: &specs.Spec{Linux: l}, Seccomp: digest}
	}
	// A digest that is not acted on would be a container without its filter.
	for name, r := range map[string]*wire.Create{
		"create":           with(good.Digest, &specs.Linux{}),
		"no linux":         with(good.Digest, nil),
		"profile twice":    with(good.Digest, &specs.Linux{Seccomp: &specs.LinuxSeccomp{}}),
		"no digest":        with("", &specs.Linux{}),
		"short digest":     with(good.Digest[:62], &specs.Linux{}),
		"long digest":      with(good.Digest+"00", &specs.Linux{}),
		"not hexadecimal":  with("x"+good.Digest[1:], &specs.Linux{}),
		"odd number of it": with(good.Digest[:63], &specs.Linux{}),
	} {
		op := wire.OpCreateProfile
		if name == "create" {
			op = wire.OpCreate
		}
		if _, err := p.fill(op, r); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// recorder is a runtime that remembers its requests.
type recorder struct{ got []oci.CreateRequest }

func (r *recorder) Create(_ context.Context, req oci.CreateRequest) (oci.Container, error) {
	r.got = append(r.got, req)
	return nil, errdefs.ErrUnavailable // nothing to delete
}

// TestCreateByDigest: the runtime gets the profile with its digest, decoded once.
func TestCreateByDigest(t *testing.T) {
	s := fakeServer(t)
	rt := &recorder{}
	s.cfg.Handlers = map[string]oci.Runtime{"": rt}
	x := profileOf(`{"defaultAction":"SCMP_ACT_KILL"}`)
	create := func(op wire.Op, digest string) error {
		return s.create(frame(t, op, wire.Create{ID: id.NewContainer(), Spec: &specs.Spec{Linux: &specs.Linux{}}, Seccomp: digest}))
	}
	err := create(wire.OpCreateProfile, x.Digest)
	if got := wire.ToError(err); !errors.Is(error(got), wire.ErrUnknownProfile) || len(rt.got) != 0 || len(s.list()) != 0 {
		t.Errorf("unknown: %v, %d requests", err, len(rt.got))
	}
	if err := s.simple(frame(t, wire.OpProfile, x), nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := create(wire.OpCreateProfile, x.Digest); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if err := create(wire.OpCreate, ""); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Fatal(err)
	}
	first, second, plain := rt.got[0], rt.got[1], rt.got[2]
	if p := first.Spec.Linux.Seccomp; p == nil || p.DefaultAction != specs.ActKill || p != second.Spec.Linux.Seccomp ||
		hex.EncodeToString(first.SeccompDigest[:]) != x.Digest || first.SeccompDigest != second.SeccompDigest {
		t.Errorf("%+v %x", p, first.SeccompDigest)
	}
	if plain.Spec.Linux.Seccomp != nil || plain.SeccompDigest != [32]byte{} {
		t.Errorf("without: %+v", plain)
	}
}
