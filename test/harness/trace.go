package harness

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Traces are what a daemon and its supervisor keep for pods, containers and
// images, each as "kind what".
type Traces map[string]bool

// Beyond returns what is in t and not in before.
func (t Traces) Beyond(before Traces) (out []string) {
	for k := range t {
		if !before[k] {
			out = append(out, k)
		}
	}
	return out
}

// Traces are the files below the daemon's folders, the mounts there, and the
// descriptors that the supervisor keeps.
func (d *Daemon) Traces() Traces {
	out := Traces{}
	for _, top := range []string{"root", "run"} {
		_ = filepath.WalkDir(filepath.Join(d.Dir, top), func(path string, _ fs.DirEntry, err error) error {
			if err == nil && !strings.HasSuffix(path, "/run/berthd.lock") {
				out["file "+path] = true
			}
			return nil
		})
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], d.Dir+"/") {
			out["mount "+f[4]] = true
		}
	}
	pid := d.SupervisorPid()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return out // the supervisor went: it had nothing to keep
	}
	for _, fd := range fds {
		target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		for _, kind := range []string{"net:[", "ipc:[", "uts:[", "user:[", "pidfd", "pipe:"} {
			if strings.Contains(target, kind) {
				out["supervisor fd "+target] = true
			}
		}
	}
	return out
}

// Hierarchies are the mount points of the cgroup hierarchies.
func Hierarchies() (out []string, err error) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 2 && (f[2] == "cgroup" || f[2] == "cgroup2") && strings.HasPrefix(f[1], "/sys/fs/cgroup") {
			out = append(out, f[1])
		}
	}
	return out, nil
}

// Cgroups are the cgroups below parent, which is not among them, in all hierarchies.
func Cgroups(parent string) (Traces, error) {
	hierarchies, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	out := Traces{}
	for _, h := range hierarchies {
		top := filepath.Join(h, parent)
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && path != top {
				out["cgroup "+path] = true
			}
			return nil
		})
	}
	return out, nil
}

// Descriptors counts the open descriptors of a process by what they are.
func Descriptors(pid int) (map[string]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for _, fd := range fds {
		target, err := os.Readlink(dir + fd.Name())
		if err != nil {
			continue // closed meanwhile
		}
		if i := strings.Index(target, "["); i >= 0 && !strings.HasPrefix(target, "anon_inode") {
			target = target[:i]
		}
		out[target]++
	}
	return out, nil
}

// Children are the processes whose parent is pid, as "pid state command".
func Children(pid int) ([]string, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range procs {
		b, err := os.ReadFile("/proc/" + p.Name() + "/stat")
		if err != nil {
			continue
		}
		open, closing := strings.IndexByte(string(b), '('), strings.LastIndexByte(string(b), ')')
		f := strings.Fields(string(b)[closing+1:])
		if open > 0 && len(f) > 1 && f[1] == fmt.Sprint(pid) {
			out = append(out, p.Name()+" "+f[0]+" "+string(b[open+1:closing]))
		}
	}
	return out, nil
}
