package state

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// Status of a container: those of the runtime-spec, and paused as runc has it.
type Status string

// The statuses.
const (
	Creating Status = Status(specs.StateCreating)
	Created  Status = Status(specs.StateCreated)
	Running  Status = Status(specs.StateRunning)
	Stopped  Status = Status(specs.StateStopped)
	Paused   Status = "paused"
)

// Status asks the kernel how the container is.
func (d *Dir) Status(r Record) (Status, error) {
	if r.Saved.Pid == 0 {
		// Nothing of the user's has run yet. Without a command that holds the lock
		// nothing ever will.
		if d.lock == nil && d.Busy() {
			return Creating, nil
		}
		return Stopped, nil
	}
	if !r.Alive() {
		return Stopped, nil
	}
	frozen, err := r.frozen()
	if err != nil {
		return "", err
	}
	switch {
	case frozen:
		return Paused, nil
	case d.atGate(r.Saved.Pid):
		return Created, nil
	}
	return Running, nil
}

// Alive reports whether the first process is there: the pid, its start time and
// not a zombie, which has ended for everybody but its parent.
func (r Record) Alive() bool {
	if r.Saved.Pid <= 0 {
		return false
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(r.Saved.Pid) + "/stat")
	if err != nil {
		return false
	}
	// After the name, which may hold anything: state is the first field, the start
	// time the twentieth (proc(5): 3 and 22).
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	return len(f) > 19 && f[0] != "Z" && f[0] != "X" && f[19] == r.Saved.Started
}

// PidFD opens the first process: ErrNotRunning when it has ended.
func (r Record) PidFD() (*os.File, error) {
	if r.Saved.Pid <= 0 {
		return nil, fmt.Errorf("%s: %w", r.Saved.ID, ErrNotRunning)
	}
	fd, err := unix.PidfdOpen(r.Saved.Pid, 0)
	if err != nil && err != unix.ESRCH && err != unix.EINVAL {
		return nil, fmt.Errorf("%s: pidfd_open %d: %w", r.Saved.ID, r.Saved.Pid, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.Saved.ID, ErrNotRunning)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	// Asked after the pidfd pins the number: from here on it is that process.
	if !r.Alive() {
		f.Close()
		return nil, fmt.Errorf("%s: %w", r.Saved.ID, ErrNotRunning)
	}
	return f, nil
}

// Signal sends sig to the first process. ErrNotRunning when it has ended.
func (r Record) Signal(sig unix.Signal) error {
	f, err := r.PidFD()
	if err != nil {
		return err
	}
	defer f.Close()
	switch err := unix.PidfdSendSignal(int(f.Fd()), sig, nil, 0); err {
	case nil:
		return nil
	case unix.ESRCH:
		return fmt.Errorf("%s: %w", r.Saved.ID, ErrNotRunning)
	default:
		return fmt.Errorf("%s: signal %d: %w", r.Saved.ID, sig, err)
	}
}

// WaitGone waits until the first process has ended, at most for wait.
func (r Record) WaitGone(wait time.Duration) error {
	f, err := r.PidFD()
	if errors.Is(err, ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	deadline := time.Now().Add(wait)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("%s: container init still running %s after SIGKILL", r.Saved.ID, wait)
		}
		p := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
		switch n, err := unix.Poll(p, int(left.Milliseconds())+1); {
		case err != nil && err != unix.EINTR:
			return fmt.Errorf("%s: wait: %w", r.Saved.ID, err)
		case n > 0:
			return nil
		}
	}
}

// frozen reads the freezer of the container's cgroup.
func (r Record) frozen() (bool, error) {
	if len(r.Saved.Cgroups) == 0 {
		return false, nil
	}
	h, err := cgroup.Detect()
	if err != nil {
		return false, err
	}
	c, err := h.Reopen("", r.Saved.Cgroups)
	if err != nil {
		return false, err
	}
	frozen, err := c.Frozen()
	if errors.Is(err, os.ErrNotExist) || errdefs.IsFailedPrecondition(err) {
		return false, nil // deleted at this moment, or there is no freezer
	}
	return frozen, err
}

// atGate reports whether process pid still waits for start. The gate is removed
// once it is through; where a killed start left it, the process itself tells: it
// holds the gate open until its execve.
func (d *Dir) atGate(pid int) bool {
	gate := d.gate()
	if len(gate) == 0 {
		return false
	}
	held, err := holds(pid, gate)
	if err == nil {
		return held
	}
	// Not ours to look into (no CAP_SYS_PTRACE): a FIFO without a reader answers ENXIO.
	for _, g := range gate {
		fd, err := unix.Open(g.path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		if err == unix.ENXIO {
			return false
		}
	}
	return true
}

// object identifies a file.
type object struct {
	path     string
	dev, ino uint64
}

// gate lists the gate's FIFOs.
func (d *Dir) gate() []object {
	dir := filepath.Join(d.Path, gateDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []object
	for _, e := range entries {
		var st unix.Stat_t
		p := filepath.Join(dir, e.Name())
		if unix.Lstat(p, &st) == nil {
			out = append(out, object{p, st.Dev, st.Ino})
		}
	}
	return out
}

// holds reports whether process pid has one of the files open.
func holds(pid int, files []object) (bool, error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return false, err
	}
	for _, n := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(f.Fd()), n, &st, 0) != nil {
			continue
		}
		for _, o := range files {
			if o.ino == st.Ino && o.dev == st.Dev {
				return true, nil
			}
		}
	}
	return false, nil
}

// KillStrays kills processes that hold the gate and are in no record: the child
// of a create that was killed before it wrote down the pid. The lock must be held.
func (d *Dir) KillStrays() error {
	gate := d.gate()
	if len(gate) == 0 {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if held, err := holds(pid, gate); err != nil || !held {
			continue // another user's, or gone
		}
		if err := killHolder(pid, gate); err != nil {
			errs = append(errs, fmt.Errorf("%s: kill stray process %d: %w", d.ID, pid, err))
		}
	}
	return errors.Join(errs...)
}

// killHolder kills pid if it is still the process that holds the gate.
func killHolder(pid int, gate []object) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if held, err := holds(pid, gate); err != nil || !held {
		return nil // it ended, and the number may be another's
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return err
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(p, 5000); err != unix.EINTR {
			return err
		}
	}
}
