package embedded

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxRanges is how many ranges the kernel takes for one user namespace (since 4.15).
const maxRanges = 340

// idMaps translate the ids of a user namespace to those of the runtime's own.
// Without ranges they change nothing.
type idMaps struct {
	uids, gids []specs.LinuxIDMapping
}

func (m idMaps) empty() bool { return len(m.uids) == 0 && len(m.gids) == 0 }

// uid and gid return the host's id, false when the container's has none.
func (m idMaps) uid(id uint32) (uint32, bool) { return mapped(m.uids, id, m.empty()) }
func (m idMaps) gid(id uint32) (uint32, bool) { return mapped(m.gids, id, m.empty()) }

func mapped(ranges []specs.LinuxIDMapping, id uint32, same bool) (uint32, bool) {
	if same {
		return id, true
	}
	for _, r := range ranges {
		if id >= r.ContainerID && uint64(id) < uint64(r.ContainerID)+uint64(r.Size) {
			return r.HostID + (id - r.ContainerID), true
		}
	}
	return 0, false
}

// checkRanges checks what the kernel would refuse with a bare EINVAL.
func checkRanges(field string, ranges []specs.LinuxIDMapping) error {
	if len(ranges) == 0 {
		return invalid("%s: missing; a new user namespace needs at least one range", field)
	}
	if len(ranges) > maxRanges {
		return invalid("%s: %d ranges, the kernel takes %d", field, len(ranges), maxRanges)
	}
	for i, r := range ranges {
		if r.Size == 0 {
			return invalid("%s[%d].size: 0", field, i)
		}
		if uint64(r.ContainerID)+uint64(r.Size) > 1<<32-1 || uint64(r.HostID)+uint64(r.Size) > 1<<32-1 {
			return invalid("%s[%d]: goes beyond the last id, 4294967294", field, i)
		}
		for k, o := range ranges[:i] {
			if overlap(r.ContainerID, r.Size, o.ContainerID, o.Size) || overlap(r.HostID, r.Size, o.HostID, o.Size) {
				return invalid("%s[%d]: overlaps %s[%d]", field, i, field, k)
			}
		}
	}
	return nil
}

func overlap(a, an, b, bn uint32) bool {
	return uint64(a) < uint64(b)+uint64(bn) && uint64(b) < uint64(a)+uint64(an)
}

// rangesText is a mapping as /proc/<pid>/uid_map takes and shows it.
func rangesText(ranges []specs.LinuxIDMapping) []byte {
	var b bytes.Buffer
	for _, r := range ranges {
		fmt.Fprintf(&b, "%d %d %d\n", r.ContainerID, r.HostID, r.Size)
	}
	return b.Bytes()
}

// parseRanges reads /proc/<pid>/uid_map.
func parseRanges(b []byte) ([]specs.LinuxIDMapping, error) {
	var out []specs.LinuxIDMapping
	for line := range strings.Lines(string(b)) {
		var r specs.LinuxIDMapping
		if _, err := fmt.Sscan(line, &r.ContainerID, &r.HostID, &r.Size); err != nil {
			return nil, fmt.Errorf("id mapping %q: %w", line, err)
		}
		out = append(out, r)
	}
	return out, nil
}

// sameRanges compares two mappings without regard to their order.
func sameRanges(a, b []specs.LinuxIDMapping) bool {
	key := func(x, y specs.LinuxIDMapping) int { return int(int64(x.ContainerID) - int64(y.ContainerID)) }
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, key)
	slices.SortFunc(b, key)
	return slices.Equal(a, b)
}

// holder is a process that was made for its namespaces: a Go process has many
// threads, and none of them can enter or make a user namespace.
type holder struct {
	*child
	rt   *Runtime
	gate *os.File // the holder goes on when a byte comes, and ends with its end
}

// hold starts a process that enters the user namespace user, or a new one with
// the mapping maps if user is nil, and then makes the other namespaces of flags,
// which belong to it. The caller opens what it needs and ends the holder.
func (r *Runtime) hold(user *os.File, maps idMaps, flags int) (_ *holder, err error) {
	wait, gate, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer wait.Close()
	s := newScript(nil)
	s.do("prctl PR_SET_DUMPABLE", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	in := s.fd(wait)
	if user != nil {
		s.do("join user namespace", unix.SYS_SETNS, s.fd(user), unix.CLONE_NEWUSER)
	} else {
		s.do("new user namespace", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)
		s.hold(in)
	}
	if flags != 0 {
		// What the other namespaces hold belongs to the container's root; one without
		// id 0 leaves it to the host's.
		s.do("setresgid", unix.SYS_SETRESGID, 0, 0, 0).ignore(unix.EINVAL)
		s.do("setresuid", unix.SYS_SETRESUID, 0, 0, 0).ignore(unix.EINVAL)
		s.do("new namespaces", unix.SYS_UNSHARE, flags)
	}
	s.hold(in)
	c, err := r.spawn(s, launch{stdio: [3]*os.File{r.null, r.null, r.null}})
	if err != nil {
		return nil, errors.Join(err, gate.Close())
	}
	h := &holder{c, r, gate}
	if _, err := c.next(); err != nil {
		return nil, errors.Join(err, gate.Close())
	}
	if user != nil {
		return h, nil
	}
	if err := h.writeMaps(maps); err != nil {
		return nil, errors.Join(err, h.end())
	}
	if _, err := gate.Write([]byte{1}); err != nil {
		return nil, errors.Join(err, h.end())
	}
	if _, err := c.next(); err != nil {
		return nil, errors.Join(err, gate.Close())
	}
	return h, nil
}

// idle starts a process that does nothing until it is ended.
func (r *Runtime) idle() (*holder, error) {
	wait, gate, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer wait.Close()
	s := newScript(nil)
	in := s.fd(wait)
	s.hold(in)
	c, err := r.spawn(s, launch{stdio: [3]*os.File{r.null, r.null, r.null}})
	if err == nil {
		_, err = c.next()
	}
	if err != nil {
		return nil, errors.Join(err, gate.Close())
	}
	return &holder{c, r, gate}, nil
}

func (h *holder) writeMaps(maps idMaps) error {
	for _, m := range []struct {
		file, field string
		ranges      []specs.LinuxIDMapping
	}{{"uid_map", "linux.uidMappings", maps.uids}, {"gid_map", "linux.gidMappings", maps.gids}} {
		f, err := h.open(m.file, unix.O_WRONLY)
		if err != nil {
			return fmt.Errorf("%s: %w", m.field, err)
		}
		_, err = f.Write(rangesText(m.ranges)) // one write: the kernel takes no second one
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("%s: %w", m.field, err)
		}
	}
	return nil
}

// mapsOf reads the mapping of a process's user namespace.
func (r *Runtime) mapsOf(pid int) (m idMaps, err error) {
	for _, x := range []struct {
		file string
		to   *[]specs.LinuxIDMapping
	}{{"uid_map", &m.uids}, {"gid_map", &m.gids}} {
		f, err := r.openProc(fmt.Sprintf("%d/%s", pid, x.file), unix.O_RDONLY)
		if err != nil {
			return m, err
		}
		var b bytes.Buffer
		_, err = b.ReadFrom(f)
		f.Close()
		if err == nil {
			*x.to, err = parseRanges(b.Bytes())
		}
		if err != nil {
			return m, err
		}
	}
	return m, nil
}

// open opens a file of the holder's directory in the private procfs.
func (h *holder) open(name string, flags int) (*os.File, error) {
	return h.rt.openProc(fmt.Sprintf("%d/%s", h.Pid, name), flags)
}

// end ends the holder. Its namespaces live on in what was opened.
func (h *holder) end() error {
	return errors.Join(h.gate.Close(), h.status.Close(), abandon(h.Process))
}

// userNSFor makes a user namespace that stands for a mapping: what an idmapped
// mount takes.
func (r *Runtime) userNSFor(maps idMaps) (*os.File, error) {
	h, err := r.hold(nil, maps, 0)
	if err != nil {
		return nil, err
	}
	f, err := h.open("ns/user", unix.O_RDONLY)
	return f, errors.Join(err, h.end())
}
