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

// get returns the filter of p. digest is oci.CreateRequest.SeccompDigest; when it
// is zero it is made here, by encoding the profile.
func (c *filterCache) get(p *specs.LinuxSeccomp, digest [32]byte) (*seccomp.Filter, error) {
	if digest == [32]byte{} {
		b, err := json.Marshal(p)
		if err != nil {
			return nil, invalid("linux.seccomp: %w", err)
		}
		digest = sha256.Sum256(b)
	}
	c.mu.Lock()
	f := c.m[digest]
	c.mu.Unlock()
	if f != nil {
		return f, nil
	}
	f, err := seccomp.Compile(p)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if c.m == nil || len(c.m) >= maxFilters {
		c.m = map[[32]byte]*seccomp.Filter{}
	}
	c.m[digest] = f
	c.mu.Unlock()
	return f, nil
}

// loadFilter appends the call that makes the filter the process's. With
// f.Listener its result (out) is the number of the listener, close-on-exec: the
// process must report it and wait before execve closes it. Until then it may
// only write and read, which every profile that notifies allows
// (seccomp.Compile); other calls may be denied, or notified to nobody.
func (s *script) loadFilter(f *seccomp.Filter) call {
	const setModeFilter = 1
	insns := s.put(unsafe.Slice((*byte)(unsafe.Pointer(&f.Prog[0])), len(f.Prog)*int(unsafe.Sizeof(unix.SockFilter{}))))
	prog := make([]byte, 16) // struct sock_fprog
	binary.LittleEndian.PutUint16(prog, uint16(len(f.Prog)))
	binary.LittleEndian.PutUint64(prog[8:], uint64(insns))
	return s.do("seccomp", unix.SYS_SECCOMP, setModeFilter, f.Flags, prog)
}
