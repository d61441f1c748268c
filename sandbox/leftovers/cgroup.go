package leftovers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
)

// cgroups looks for cgroups of objects that were forgotten, and for processes in
// them. Pods' cgroups are below the kubelet's, where others have theirs, named by
// ids as ours are: only the past proves that one is Berth's.
func (l *look) cgroups() error {
	gone := map[Object]bool{}
	past := map[string]bool{}
	for _, o := range l.Past.List() {
		past[o.ID] = true
		if l.onRecord(o.ID) { // it was about to be forgotten when the daemon died
			continue
		}
		dirs := l.existing(o.Cgroup)
		if len(dirs) == 0 {
			gone[o] = true
			continue
		}
		l.processes(dirs, o.Cgroup, "whose record was removed", true)
		l.add(leftover.Finding{Kind: leftover.Cgroup, Name: o.Cgroup, Since: o.At,
			Detail: fmt.Sprintf("of a container or pod sandbox whose record was removed; %s", places(dirs)),
			Remove: func(ctx context.Context) error {
				if l.onRecord(o.ID) {
					return nil
				}
				return removeCgroup(ctx, l.existing(o.Cgroup), o.Cgroup)
			}})
	}
	return errors.Join(l.Past.Drop(gone), l.unproved(past))
}

// places names the first directory of a cgroup and counts the others.
func places(dirs []string) string {
	if len(dirs) == 1 {
		return "in " + dirs[0]
	}
	return fmt.Sprintf("in %s and %d other hierarchies", dirs[0], len(dirs)-1)
}

// existing are the directories of a cgroup.
func (l *look) existing(cgroup string) (dirs []string) {
	for _, root := range l.Cgroups {
		dir := filepath.Join(root, cgroup)
		var st unix.Stat_t
		if unix.Lstat(dir, &st) == nil {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// unproved reports cgroups of pods that nothing is known of, below our own parent.
// They may be another daemon's, and are left alone when one can be seen.
func (l *look) unproved(past map[string]bool) error {
	found := map[string][]string{}
	for _, root := range l.Cgroups {
		all, err := names(filepath.Join(root, l.Parent))
		if err != nil {
			return err
		}
		for _, name := range all {
			if len(name) == 64 && id.Valid(name) == nil && !past[name] && !l.rec.Pod(id.Pod(name)) {
				found[name] = append(found[name], filepath.Join(root, l.Parent, name))
			}
		}
	}
	if len(found) == 0 || l.othersRun() {
		return nil
	}
	for name, dirs := range found {
		cgroup := path.Join(l.Parent, name)
		l.processes(dirs, cgroup, "of which no record is known", false)
		l.add(leftover.Finding{Kind: leftover.Cgroup, Name: cgroup, Detail: "below Berth's own parent, and no record of it is known; " + places(dirs),
			Remedy: "if no other Berth runs on this node, kill what is in it and remove the directories"})
	}
	return nil
}

// othersRun tells whether a supervisor runs on this machine that is not ours: all
// are in a cgroup of that name.
func (l *look) othersRun() bool {
	for _, root := range l.Cgroups {
		for _, pid := range pidsIn(filepath.Join(root, "berth-supervisor")) {
			if pid != l.SupervisorPid {
				return true
			}
		}
	}
	return false
}

// processes reports the processes in the directories of a cgroup, and below it.
func (l *look) processes(dirs []string, cgroup, why string, ours bool) {
	seen := map[int]bool{}
	for _, dir := range dirs {
		_ = walk(dir, func(dir string) error {
			for _, pid := range pidsIn(dir) {
				if seen[pid] || !inCgroup(pid, cgroup) {
					continue
				}
				seen[pid] = true
				comm, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
				f := leftover.Finding{Kind: leftover.Process, Name: strconv.Itoa(pid),
					Detail: fmt.Sprintf("%q runs in cgroup %s, of a container or pod sandbox %s", strings.TrimSpace(string(comm)), cgroup, why),
					Remedy: "kill it if it is not another Berth's"}
				if st, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
					f.Since = st.ModTime()
				}
				if ours {
					f.Remedy, f.Remove = "", func(context.Context) error { return kill(pid, cgroup) }
				}
				l.add(f)
			}
			return nil
		})
	}
}

// walk calls f for a cgroup's directory and those below it, the innermost first.
func walk(dir string, f func(dir string) error) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := walk(filepath.Join(dir, e.Name()), f); err != nil {
				return err
			}
		}
	}
	return f(dir)
}

// pidsIn lists the processes in a cgroup; none when it is gone, or is a threaded one.
func pidsIn(dir string) (pids []int) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	for f := range strings.FieldsSeq(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 1 { // 0: of a PID namespace outside of ours
			pids = append(pids, pid)
		}
	}
	return pids
}

// inCgroup tells whether a process is in a cgroup, or below it, in some hierarchy.
func inCgroup(pid int, cgroup string) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && (f[2] == cgroup || strings.HasPrefix(f[2], cgroup+"/")) {
			return true
		}
	}
	return false
}

// kill kills a process if it is in the cgroup. The pidfd is opened first, so a pid
// that was given to another process meanwhile is left alone.
func kill(pid int, cgroup string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if pid == os.Getpid() || !inCgroup(pid, cgroup) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("process %d: kill: %w", pid, err)
	}
	return nil
}

// clearLimit is how long removeCgroup waits for killed processes to go.
const clearLimit = 2 * time.Second

// removeCgroup kills what is in the directories of a cgroup and removes them.
func removeCgroup(ctx context.Context, dirs []string, cgroup string) error {
	for deadline := time.Now().Add(clearLimit); ; {
		var errs []error
		for _, dir := range dirs {
			// A frozen process dies only when it is thawed.
			_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("THAWED"), 0)
			_ = os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0)
			errs = append(errs, walk(dir, func(dir string) error {
				for _, pid := range pidsIn(dir) {
					if err := kill(pid, cgroup); err != nil {
						return err
					}
				}
				if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
					return fmt.Errorf("cgroup %s: rmdir: %w", dir, err)
				}
				return nil
			}))
		}
		err := errors.Join(errs...)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
