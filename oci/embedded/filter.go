package embedded

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"sync"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/embedded/seccomp"
)

// filterCache keeps compiled seccomp profiles by their content: a node uses a
// handful of profiles for all its containers.
type filterCache struct {
	mu sync.Mutex
	m  map[[32]byte]*seccomp.Filter // guarded by mu
}

const maxFilters = 128

func (c *filterCache) get(p *specs.LinuxSeccomp) (*seccomp.Filter, error) {
	b, err := json.Marshal(p)
	if err != nil {
		return nil, invalid("linux.seccomp: %w", err)
	}
	key := sha256.Sum256(b)
	c.mu.Lock()
	f := c.m[key]
	c.mu.Unlock()
	if f != nil {
		return f, nil
	}
	if f, err = seccomp.Compile(p); err != nil {
		return nil, err
	}
	c.mu.Lock()
	if c.m == nil || len(c.m) >= maxFilters {
		c.m = map[[32]byte]*seccomp.Filter{}
	}
	c.m[key] = f
	c.mu.Unlock()
	return f, nil
}

// loadFilter appends the call that makes the filter the process's.
func (s *script) loadFilter(f *seccomp.Filter) call {
	const setModeFilter = 1
	insns := s.put(unsafe.Slice((*byte)(unsafe.Pointer(&f.Prog[0])), len(f.Prog)*int(unsafe.Sizeof(unix.SockFilter{}))))
	prog := make([]byte, 16) // struct sock_fprog
	binary.LittleEndian.PutUint16(prog, uint16(len(f.Prog)))
	binary.LittleEndian.PutUint64(prog[8:], uint64(insns))
	return s.do("seccomp", unix.SYS_SECCOMP, setModeFilter, f.Flags, prog)
}
