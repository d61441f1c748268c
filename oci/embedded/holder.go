package embedded

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

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
	if !r.plain { // its procfs directory must stay its user's
		s.do("prctl PR_SET_DUMPABLE", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	}
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

// writeMaps gives the holder's new user namespace its mapping.
func (h *holder) writeMaps(maps idMaps) error { return h.rt.writeMaps(h.Pid, maps) }

func (r *Runtime) writeMaps(pid int, maps idMaps) error {
	for _, m := range []struct {
		file, field, program string
		ranges               []specs.LinuxIDMapping
		own                  int
	}{
		{"uid_map", "linux.uidMappings", "newuidmap", maps.uids, os.Geteuid()},
		{"gid_map", "linux.gidMappings", "newgidmap", maps.gids, os.Getegid()},
	} {
		var err error
		if r.plain && !(len(m.ranges) == 1 && m.ranges[0].Size == 1 && int64(m.ranges[0].HostID) == int64(m.own)) {
			err = mapBy(m.program, pid, m.ranges)
		} else {
			if r.plain && m.file == "gid_map" {
				// The kernel's condition for a mapping without privileges (CVE-2014-8989).
				err = r.writeProc(pid, "setgroups", []byte("deny"))
			}
			if err == nil {
				err = r.writeProc(pid, m.file, rangesText(m.ranges))
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", m.field, err)
		}
	}
	return nil
}

// writeProc writes a file of a process's directory in one write: mappings take no
// second one.
func (r *Runtime) writeProc(pid int, name string, b []byte) error {
	f, err := r.openProc(fmt.Sprintf("%d/%s", pid, name), unix.O_WRONLY)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// mapBy has a set-user-id program of the host (newuidmap(1)) map the ranges that
// /etc/subuid and /etc/subgid give to the user.
func mapBy(program string, pid int, ranges []specs.LinuxIDMapping) error {
	path, err := exec.LookPath(program)
	if err != nil {
		return fmt.Errorf("%s: not found; install it (Debian: uidmap), or map the user's own id alone: %w", program, errdefs.ErrFailedPrecondition)
	}
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	args := []string{strconv.Itoa(pid)}
	for _, r := range ranges {
		for _, v := range []uint32{r.ContainerID, r.HostID, r.Size} {
			args = append(args, strconv.FormatUint(uint64(v), 10))
		}
	}
	var out tail
	cmd := exec.Command(path, args...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = []string{}, "/", &out, &out
	if err := withOutput(cmd.Run(), &out); err != nil {
		return fmt.Errorf("%s: %w: %w", program, err, errdefs.ErrPermissionDenied)
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
	if err = errors.Join(err, h.end()); err != nil {
		closeAll(&f)
		return nil, err
	}
	return f, nil
}

// RunInUserNS runs the calling program again, with args, env and io, in a user
// namespace with the mappings of l and a mount namespace that belongs to it: there
// it is root and makes containers for a user who is not (rootless). The process is
// the caller's child.
func (r *Runtime) RunInUserNS(l *specs.Linux, args, env []string, io oci.Stdio) (_ oci.Process, err error) {
	maps := idMaps{l.UIDMappings, l.GIDMappings}
	for _, x := range []struct {
		field  string
		ranges []specs.LinuxIDMapping
	}{{"linux.uidMappings", maps.uids}, {"linux.gidMappings", maps.gids}} {
		if err := checkRanges(x.field, x.ranges); err != nil {
			return oci.Process{}, err
		}
	}
	self, err := os.OpenFile("/proc/self/exe", unix.O_PATH, 0)
	if err != nil {
		return oci.Process{}, err
	}
	defer self.Close()
	wait, gate, err := os.Pipe()
	if err != nil {
		return oci.Process{}, err
	}
	defer wait.Close()
	defer gate.Close()
	s := newScript(io.Extra)
	in, exe := s.fd(wait), s.fd(self)
	s.do("new user namespace", unix.SYS_UNSHARE, unix.CLONE_NEWUSER|unix.CLONE_NEWNS)
	s.hold(in)
	s.do("setresgid", unix.SYS_SETRESGID, 0, 0, 0).ignore(unix.EINVAL)
	s.do("setresuid", unix.SYS_SETRESUID, 0, 0, 0).ignore(unix.EINVAL)
	s.do("close_range", unix.SYS_CLOSE_RANGE, s.status(), uintptr(0xffffffff), unix.CLOSE_RANGE_CLOEXEC)
	s.do("signal mask", unix.SYS_RT_SIGPROCMASK, 2, make([]byte, 8), 0, 8)
	s.do("exec", unix.SYS_EXECVEAT, exe, "", s.strs(args), s.strs(env), unix.AT_EMPTY_PATH)
	files := [3]*os.File{io.In, io.Out, io.Err}
	for i, f := range files {
		if f == nil {
			files[i] = r.null
		}
	}
	c, err := r.spawn(s, launch{stdio: files})
	if err != nil {
		return oci.Process{}, err
	}
	if _, err := c.next(); err != nil {
		return oci.Process{}, fmt.Errorf("user namespace: %w", err)
	}
	if err := r.writeMaps(c.Pid, maps); err != nil {
		return oci.Process{}, c.fail(err)
	}
	if _, err := gate.Write([]byte{1}); err != nil {
		return oci.Process{}, c.fail(err)
	}
	return c.finish()
}
