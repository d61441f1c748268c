package supervisor

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

const (
	maxProfiles     = 64
	maxProfileBytes = 4 << 20 // of text, all together
)

// profiles are the seccomp profiles that Creates name by their digest. They are
// decoded once and shared by all containers, so nobody may change them. When
// there is no more room the oldest go: their senders send them again.
type profiles struct {
	mu    sync.Mutex
	m     map[[32]byte]*profile
	order [][32]byte // oldest first
	bytes int
}

type profile struct {
	seccomp *specs.LinuxSeccomp
	size    int
}

// put serves OpProfile.
func (p *profiles) put(r wire.Profile) error {
	if len(r.Text) > wire.MaxProfile {
		return fmt.Errorf("profile: %d bytes, at most %d; send it in the spec: %w", len(r.Text), wire.MaxProfile, errdefs.ErrInvalidArgument)
	}
	if p.knows(r.Digest) { // what its text is was checked then
		return nil
	}
	digest := sha256.Sum256(r.Text)
	if got := hex.EncodeToString(digest[:]); got != r.Digest {
		return fmt.Errorf("profile: digest %q, but the text has %s: %w", r.Digest, got, errdefs.ErrInvalidArgument)
	}
	var s *specs.LinuxSeccomp
	if err := json.Unmarshal(r.Text, &s); err != nil || s == nil {
		return fmt.Errorf("profile: not a seccomp profile: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.m[digest] != nil {
		return nil
	}
	for len(p.order) >= maxProfiles || p.bytes+len(r.Text) > maxProfileBytes {
		oldest := p.order[0]
		p.order = p.order[1:]
		p.bytes -= p.m[oldest].size
		delete(p.m, oldest)
	}
	if p.m == nil {
		p.m = map[[32]byte]*profile{}
	}
	p.m[digest] = &profile{s, len(r.Text)}
	p.order = append(p.order, digest)
	p.bytes += len(r.Text)
	return nil
}

func (p *profiles) knows(hexDigest string) bool {
	var digest [32]byte
	if b, err := hex.DecodeString(hexDigest); err != nil || copy(digest[:], b) != len(digest) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.m[digest] != nil
}

// fill puts the named profile into the spec and returns its digest; zero when
// the spec has its profile itself, or none.
func (p *profiles) fill(op wire.Op, r *wire.Create) (digest [32]byte, err error) {
	if op == wire.OpCreate && r.Seccomp == "" {
		return digest, nil
	}
	if op == wire.OpCreate || r.Spec.Linux == nil || r.Spec.Linux.Seccomp != nil {
		return digest, fmt.Errorf("%s: seccomp %q: want %s, with a spec that has linux and not linux.seccomp: %w", op, r.Seccomp, wire.OpCreateProfile, errdefs.ErrInvalidArgument)
	}
	b, err := hex.DecodeString(r.Seccomp)
	if err != nil || copy(digest[:], b) != len(digest) || len(b) != len(digest) {
		return digest, fmt.Errorf("seccomp %q: not a digest: %w", r.Seccomp, errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	found := p.m[digest]
	p.mu.Unlock()
	if found == nil {
		return digest, fmt.Errorf("%s is not here: %w", r.Seccomp, wire.ErrUnknownProfile)
	}
	r.Spec.Linux.Seccomp = found.seccomp
	return digest, nil
}
