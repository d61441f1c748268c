package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// controllerDir returns the directory holding a controller's files.
func (c *Cgroup) controllerDir(name string) (string, error) {
	if c.host.V2() {
		return c.dirs[0].path, nil
	}
	for _, d := range c.dirs {
		if d.Has(name) {
			return d.path, nil
		}
	}
	return "", fmt.Errorf("cgroup %s: the %s controller is not mounted: %w", c.path, name, errdefs.ErrFailedPrecondition)
}

// OOMKills counts processes the OOM killer has killed in the cgroup and below.
func (c *Cgroup) OOMKills() (uint64, error) {
	dir, err := c.controllerDir("memory")
	if err != nil {
		return 0, err
	}
	file := "memory.oom_control"
	if c.host.V2() {
		file = "memory.events"
	}
	text, err := readFile(filepath.Join(dir, file))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" {
			return strconv.ParseUint(f[1], 10, 64)
		}
	}
	return 0, nil
}

// freezeWait bounds the wait for a cgroup to freeze.
const freezeWait = 10 * time.Second

// Freeze stops all processes of the cgroup and returns once they stand. On error
// they go on.
func (c *Cgroup) Freeze() error { return c.freeze(freezeWait) }

func (c *Cgroup) freeze(wait time.Duration) (err error) {
	dir, err := c.controllerDir("freezer")
	if err != nil {
		return err
	}
	file, value, state := "freezer.state", "FROZEN", "freezer.state"
	if c.host.V2() {
		file, value, state = "cgroup.freeze", "1", "cgroup.events"
	}
	defer func() {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			err = errors.Join(err, c.Thaw())
		}
	}()
	deadline := time.Now().Add(wait)
	pause := 50 * time.Microsecond
	for i := 1; ; i++ {
		// Written again each time: on v1 a process forked or moved in meanwhile keeps
		// the cgroup FREEZING for ever. Thawing it now and then lets such a process get
		// to where it can be frozen.
		if i%50 == 0 && !c.host.V2() {
			if err := c.Thaw(); err != nil {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := writeFile(filepath.Join(dir, file), value); err != nil {
			return err
		}
		text, err := readFile(filepath.Join(dir, state))
		if err != nil {
			return err
		}
		if text == "FROZEN" || strings.Contains(text, "frozen 1") {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("cgroup %s: not frozen after %s: %w", c.path, wait, errdefs.ErrUnavailable)
		}
		time.Sleep(pause)
		pause = min(2*pause, 10*time.Millisecond)
	}
}

// Thaw lets the processes go on.
func (c *Cgroup) Thaw() error {
	dir, err := c.controllerDir("freezer")
	if err != nil {
		return err
	}
	if c.host.V2() {
		return writeFile(filepath.Join(dir, "cgroup.freeze"), "0")
	}
	return writeFile(filepath.Join(dir, "freezer.state"), "THAWED")
}

// Frozen reports whether the cgroup itself was told to freeze: not one that
// stands only because a cgroup above it is frozen.
func (c *Cgroup) Frozen() (bool, error) {
	dir, err := c.controllerDir("freezer")
	if err != nil {
		return false, err
	}
	file := "freezer.self_freezing"
	if c.host.V2() {
		file = "cgroup.freeze"
	}
	text, err := readFile(filepath.Join(dir, file))
	return text == "1", err
}

// whileFrozen calls f while the processes stand; a paused container stays paused.
func (c *Cgroup) whileFrozen(f func() error) (err error) {
	was, err := c.Frozen()
	if err != nil {
		return err
	}
	if !was {
		if err := c.Freeze(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.Thaw()) }()
	}
	return f()
}

// KillAll sends SIGKILL to all processes of the cgroup and below, frozen ones
// included. It returns once all are sent; they may still be dying.
func (c *Cgroup) KillAll() error {
	if c.host.V2() {
		err := writeFile(filepath.Join(c.dirs[0].path, "cgroup.kill"), "1")
		// A threaded cgroup takes no cgroup.kill.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		if _, serr := os.Stat(c.dirs[0].path); serr != nil {
			return nil // the cgroup is gone: nothing lives in it
		}
	}
	return c.killEach()
}

// killFreezeWait is how long the other processes wait for their signal when one
// cannot be frozen: one in uninterruptible sleep may never be.
const killFreezeWait = 200 * time.Millisecond

// killRounds bounds the rounds of killEach against a cgroup that can not be
// frozen and forks faster than it is killed.
const killRounds = 100

// killEach is for kernels without cgroup.kill: the cgroup is frozen so that no
// fork escapes the list, and thawed for the signals to act, whatever failed.
func (c *Cgroup) killEach() error {
	dir := c.freezerDir()
	signalled := map[int]bool{}
	for range killRounds {
		pids, err := processes(dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		ferr := c.freeze(killFreezeWait)
		pids, err = processes(dir)
		fresh := false
		for _, p := range pids {
			fresh = fresh || !signalled[p]
			signalled[p] = true
			if kerr := unix.Kill(p, unix.SIGKILL); kerr != nil && kerr != unix.ESRCH {
				err = errors.Join(err, fmt.Errorf("kill %d: %w", p, kerr))
			}
		}
		if terr := c.thawAll(dir); terr != nil && ferr == nil {
			err = errors.Join(err, terr)
		}
		// The kernel lets no process fork that has SIGKILL pending: when all had it
		// before this round, nobody is left out.
		if ferr == nil || err != nil || !fresh {
			return err
		}
	}
	return fmt.Errorf("cgroup %s: its processes could not be frozen and fork faster than they are killed: %w", c.path, errdefs.ErrUnavailable)
}

// thawAll thaws the cgroup and those that the container made and froze below it:
// on v1 a frozen process does not act on SIGKILL.
func (c *Cgroup) thawAll(dir string) error {
	if c.host.V2() {
		return c.Thaw()
	}
	err := c.Thaw()
	walk(dir, func(at string) {
		if at != dir {
			_ = writeFile(filepath.Join(at, "freezer.state"), "THAWED")
		}
	})
	return err
}

func (c *Cgroup) freezerDir() string {
	if d, err := c.controllerDir("freezer"); err == nil {
		return d
	}
	return c.dirs[0].path
}

// Processes lists the processes in the cgroup and below.
func (c *Cgroup) Processes() ([]int, error) { return processes(c.freezerDir()) }

func processes(dir string) ([]int, error) {
	var pids []int
	var failed error
	walk(dir, func(at string) {
		text, err := readFile(filepath.Join(at, "cgroup.procs"))
		// EOPNOTSUPP: a threaded cgroup, whose processes the one above it lists.
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) {
			failed = errors.Join(failed, err)
		}
		for f := range strings.FieldsSeq(text) {
			if n, err := strconv.Atoi(f); err == nil && n > 0 {
				pids = append(pids, n)
			}
		}
	})
	return pids, failed
}

// walk calls f for a cgroup and those below it. Those that go meanwhile are
// left out: they have no processes.
func walk(dir string, f func(dir string)) {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			f(p)
		}
		return nil
	})
}
