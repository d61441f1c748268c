package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/durable"
)

const (
	cgroupName = "berth-supervisor"
	lockWait   = 3 * time.Second
)

// takeLock locks path and writes our pid into it. A supervisor that is just
// ending still has the lock for a moment, so it is waited for.
func takeLock(path string, wait time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	for deadline := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		err := control(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: another supervisor serves this directory: %w: %w", path, err, errdefs.ErrAlreadyExists)
		}
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil && !durable.IsFull(err) { // who holds the lock is what counts
		_ = f.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return f, nil
}

// listen makes the socket. The caller holds the lock, so a socket that is there
// belongs to nobody.
func listen(path string) (*os.File, fileID, error) {
	var id fileID
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, id, fmt.Errorf("socket: %w", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, id, fmt.Errorf("socket: %w", err)
	}
	// The directory is closed to others, so the mode before chmod lets nobody in.
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	if err == nil {
		err = unix.Chmod(path, 0o600)
	}
	if err == nil {
		err = unix.Listen(fd, 128)
	}
	if err == nil {
		id, err = idOf(path)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, id, fmt.Errorf("socket %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), id, nil
}

// pauseAfter slows down a loop that meets a lack of descriptors or memory.
func pauseAfter(error) { time.Sleep(50 * time.Millisecond) }

// ownScore is our oom_score_adj, 0 when it cannot be read.
func ownScore() int {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return n
}

// becomeSupervisor sets what makes this process fit to be parent of containers.
// leave undoes what outlives the process.
func becomeSupervisor(log *slog.Logger) (leave func(), err error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("prctl PR_SET_CHILD_SUBREAPER: %w", err)
	}
	// Children share our memory for a moment before execve (CVE-2019-5736's family).
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("prctl PR_SET_DUMPABLE: %w", err)
	}
	// EPERM: we lead a process group already, so a session is ours or our starter's.
	if _, err := unix.Setsid(); err != nil && err != unix.EPERM {
		return nil, fmt.Errorf("setsid: %w", err)
	}
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil && !errors.Is(err, unix.EACCES) {
		log.Warn("oom_score_adj", "error", err)
	}
	dirs := joinCgroups(log)
	return func() { leaveCgroups(dirs) }, nil
}

// joinCgroups moves this process into a cgroup of its own in every hierarchy, so
// that it is neither limited nor killed with the daemon's service.
func joinCgroups(log *slog.Logger) (joined []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		log.Warn("cgroups", "error", err)
		return nil
	}
	pid := []byte(strconv.Itoa(os.Getpid()))
	seen := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		f, t := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(t) < 1 || t[0] != "cgroup" && t[0] != "cgroup2" || seen[f[2]] {
			continue
		}
		seen[f[2]] = true // one hierarchy can be mounted twice
		dir := filepath.Join(f[4], cgroupName)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			log.Info("cgroup is not made; staying where we are", "cgroup", dir, "error", err)
			continue
		}
		inheritCpuset(f[4], dir)
		// Once at the start: a write here may wait for an RCU grace period.
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), pid, 0); err != nil {
			log.Info("cgroup is not joined; staying where we are", "cgroup", dir, "error", err)
			_ = os.Remove(dir)
			continue
		}
		joined = append(joined, dir)
	}
	return joined
}

// inheritCpuset fills the two files that a new cpuset of cgroup v1 has empty,
// which forbids joining it.
func inheritCpuset(parent, dir string) {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || len(bytes.TrimSpace(have)) > 0 {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(parent, name)); err == nil {
			_ = os.WriteFile(filepath.Join(dir, name), b, 0)
		}
	}
}

// leaveCgroups removes the cgroups; those that others are still in stay.
func leaveCgroups(dirs []string) {
	pid := []byte(strconv.Itoa(os.Getpid()))
	for _, dir := range dirs {
		_ = os.WriteFile(filepath.Join(filepath.Dir(dir), "cgroup.procs"), pid, 0)
		_ = os.Remove(dir)
	}
}

// watchTerm serves SIGTERM until ctx ends.
func (s *Server) watchTerm(ctx context.Context) {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGTERM)
	defer signal.Stop(sig)
	for {
		select {
		case <-ctx.Done():
			return
		case <-sig:
			s.terminate()
		}
	}
}
