package stats

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/sandbox/model"
)

// A cgroup file is at most a page, or a few for memory.stat; it is read with one call.
const bufferSize = 16 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// unlimited is where v1 limits start to mean "none": the kernel shows the
// largest multiple of the page size below 1<<63.
const unlimited = 1<<63 - 1<<16

// reader reads files of cgroup directories into one buffer: a text is valid
// until the next is read.
type reader struct{ buf *[]byte }

func open(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", dir, err)
	}
	return fd, nil
}

// file returns the content of the file called name in the directory dir.
// Bare system calls: os.File would register each with the poller.
func (r reader) file(dir int, name string) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	defer unix.Close(fd)
	n := 0
	for n < len(*r.buf) {
		m, err := unix.Read(fd, (*r.buf)[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if m == 0 {
			break
		}
		n += m
	}
	return (*r.buf)[:n], nil
}

// number reads a file of one number. "max" is unlimited, reported as ok == false;
// so is a file that does not exist, since its controller is not on here.
func (r reader) number(dir int, name string) (v uint64, ok bool, err error) {
	text, err := r.file(dir, name)
	if errors.Is(err, unix.ENOENT) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	text = bytes.TrimSpace(text)
	if string(text) == "max" {
		return 0, false, nil
	}
	if v, err = strconv.ParseUint(string(text), 10, 64); err != nil {
		return 0, false, fmt.Errorf("%s: %w", name, err)
	}
	return v, true, nil
}

func (r reader) v2(dir string, s *model.Stats) error {
	fd, err := open(dir)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	text, err := r.file(fd, "cpu.stat") // on every cgroup, also without the cpu controller
	if err != nil {
		return err
	}
	keys(text, func(k []byte, v uint64) {
		if string(k) == "usage_usec" {
			s.CPUNanoseconds = v * 1000
		}
	})
	if err := r.v2memory(fd, s); err != nil {
		return err
	}
	if s.Pids, _, err = r.number(fd, "pids.current"); err != nil {
		return err
	}
	for _, p := range []struct {
		file string
		to   **model.Pressure
	}{{"cpu.pressure", &s.CPUPressure}, {"memory.pressure", &s.MemoryPressure}, {"io.pressure", &s.IOPressure}} {
		text, err := r.file(fd, p.file)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP): // psi=0, or off for this cgroup
			continue
		case err != nil:
			return err
		}
		*p.to = pressure(text)
	}
	return nil
}

func (r reader) v2memory(fd int, s *model.Stats) error {
	var ok bool
	var err error
	if s.MemoryUsage, ok, err = r.number(fd, "memory.current"); err != nil || !ok {
		return err // without the controller there is nothing to say
	}
	text, err := r.file(fd, "memory.stat")
	if err != nil {
		return err
	}
	var inactive uint64
	keys(text, func(k []byte, v uint64) {
		switch string(k) {
		case "anon":
			s.RSS = v
		case "inactive_file":
			inactive = v
		case "pgfault":
			s.PageFaults = v
		case "pgmajfault":
			s.MajorPageFaults = v
		}
	})
	limit, limited, err := r.number(fd, "memory.max")
	if err != nil {
		return err
	}
	memory(s, inactive, limit, limited)
	swap, ok, err := r.number(fd, "memory.swap.current")
	if err != nil || !ok {
		return err
	}
	s.SwapUsage = &swap
	most, limited, err := r.number(fd, "memory.swap.max")
	if err == nil && limited {
		free := floor(most, swap)
		s.SwapAvailable = &free
	}
	return err
}

func (r reader) v1(mounts map[string]string, dir string, s *model.Stats) error {
	if err := r.in(path.Join(mounts["cpuacct"], dir), func(fd int) error {
		var ok bool
		var err error
		if s.CPUNanoseconds, ok, err = r.number(fd, "cpuacct.usage"); err == nil && !ok {
			err = unix.ENOENT
		}
		return err
	}); err != nil {
		return err
	}
	if err := r.in(path.Join(mounts["memory"], dir), func(fd int) error { return r.v1memory(fd, s) }); err != nil {
		return err
	}
	if mounts["pids"] == "" {
		return nil
	}
	err := r.in(path.Join(mounts["pids"], dir), func(fd int) (err error) {
		s.Pids, _, err = r.number(fd, "pids.current")
		return err
	})
	if errors.Is(err, unix.ENOENT) { // the controller is optional
		err = nil
	}
	return err
}

func (r reader) in(dir string, read func(fd int) error) error {
	fd, err := open(dir)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return read(fd)
}

func (r reader) v1memory(fd int, s *model.Stats) error {
	var ok bool
	var err error
	if s.MemoryUsage, ok, err = r.number(fd, "memory.usage_in_bytes"); err != nil {
		return err
	} else if !ok {
		return unix.ENOENT
	}
	text, err := r.file(fd, "memory.stat")
	if err != nil {
		return err
	}
	var inactive, swap uint64
	tightest, swapTightest := uint64(unlimited), uint64(unlimited)
	counted := false
	keys(text, func(k []byte, v uint64) {
		switch string(k) {
		case "total_rss":
			s.RSS = v
		case "total_inactive_file":
			inactive = v
		case "total_pgfault":
			s.PageFaults = v
		case "total_pgmajfault":
			s.MajorPageFaults = v
		case "total_swap":
			swap, counted = v, true
		case "hierarchical_memory_limit":
			tightest = v
		case "hierarchical_memsw_limit":
			swapTightest = v
		}
	})
	// The limits of memory.stat are the tightest of all ancestors; the file of the
	// cgroup itself needs to be read only when there is any limit at all.
	limit := uint64(unlimited)
	if tightest < unlimited {
		if limit, ok, err = r.number(fd, "memory.limit_in_bytes"); err != nil || !ok {
			return err
		}
	}
	memory(s, inactive, limit, limit < unlimited)
	if !counted {
		return nil
	}
	s.SwapUsage = &swap
	if swapTightest >= unlimited || limit >= unlimited {
		return nil
	}
	both, ok, err := r.number(fd, "memory.memsw.limit_in_bytes")
	if err == nil && ok && both < unlimited {
		free := floor(floor(both, limit), swap)
		s.SwapAvailable = &free
	}
	return err
}

// memory fills what follows from usage, page cache and limit.
func memory(s *model.Stats, inactive, limit uint64, limited bool) {
	s.WorkingSet = floor(s.MemoryUsage, inactive)
	if limited {
		free := floor(limit, s.WorkingSet)
		s.MemoryAvailable = &free
	}
}

// floor is a - b, at least 0: the kernel's counters are read one after the other.
func floor(a, b uint64) uint64 {
	if a < b {
		return 0
	}
	return a - b
}

// keys calls visit for each "key number" line; key is valid during the call.
func keys(text []byte, visit func(key []byte, value uint64)) {
	for len(text) > 0 {
		line := text
		if i := bytes.IndexByte(text, '\n'); i >= 0 {
			line, text = text[:i], text[i+1:]
		} else {
			text = nil
		}
		sp := bytes.IndexByte(line, ' ')
		if sp < 0 {
			continue
		}
		if v, ok := digits(line[sp+1:]); ok {
			visit(line[:sp], v)
		}
	}
}

// digits parses an unsigned number; overflow and other bytes are not ok.
func digits(b []byte) (v uint64, ok bool) {
	for _, c := range b {
		d := uint64(c - '0')
		if d > 9 || v > (1<<64-1-d)/10 {
			return 0, false
		}
		v = v*10 + d
	}
	return v, len(b) > 0
}

// pressure parses a PSI file ("some avg10=0.00 avg60=0.00 avg300=0.00 total=0").
// The kernel counts microseconds, CRI nanoseconds.
func pressure(text []byte) *model.Pressure {
	var p model.Pressure
	for line := range bytes.Lines(text) {
		f := bytes.Fields(line)
		if len(f) == 0 {
			continue
		}
		var v model.PSI
		for _, kv := range f[1:] {
			k, num, _ := bytes.Cut(kv, []byte("="))
			switch string(k) {
			case "avg10":
				v.Avg10, _ = strconv.ParseFloat(string(num), 64)
			case "avg60":
				v.Avg60, _ = strconv.ParseFloat(string(num), 64)
			case "avg300":
				v.Avg300, _ = strconv.ParseFloat(string(num), 64)
			case "total":
				us, _ := digits(num)
				v.Total = us * 1000
			}
		}
		switch string(f[0]) {
		case "some":
			p.Some = &v
		case "full":
			p.Full = &v
		}
	}
	if p.Some == nil && p.Full == nil {
		return nil
	}
	return &p
}
