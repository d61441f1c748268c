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

// Freeze stops all processes of the cgroup and returns once they stand.
func (c *Cgroup) Freeze() error {
	dir, err := c.controllerDir("freezer")
	if err != nil {
		return err
	}
	file, value, state := "freezer.state", "FROZEN", "freezer.state"
	if c.host.V2() {
		file, value, state = "cgroup.freeze", "1", "cgroup.events"
	}
	deadline := time.Now().Add(freezeWait)
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		// Written again each time: a process forked meanwhile may stay FREEZING on v1.
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
			return errors.Join(fmt.Errorf("cgroup %s: not frozen after %s: %w", c.path, freezeWait, errdefs.ErrUnavailable), c.Thaw())
		}
		time.Sleep(pause)
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

// KillAll sends SIGKILL to all processes of the cgroup and below, frozen ones
// included. It returns once all are sent; they may still be dying.
func (c *Cgroup) KillAll() error {
	if c.host.V2() {
		err := writeFile(filepath.Join(c.dirs[0].path, "cgroup.kill"), "1")
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, serr := os.Stat(c.dirs[0].path); serr != nil {
			return nil // the cgroup is gone: nothing lives in it
		}
	}
	return c.killEach()
}

// killEach is for kernels without cgroup.kill: the cgroup is frozen so that no
// fork escapes the list, and thawed for the signals to act.
func (c *Cgroup) killEach() error {
	dir := c.dirs[0].path
	if d, err := c.controllerDir("freezer"); err == nil {
		dir = d
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	pids, err := processes(dir)
	if err != nil || len(pids) == 0 {
		return err
	}
	ferr := c.Freeze()
	pids, err = processes(dir)
	for _, p := range pids {
		if kerr := unix.Kill(p, unix.SIGKILL); kerr != nil && kerr != unix.ESRCH {
			err = errors.Join(err, fmt.Errorf("kill %d: %w", p, kerr))
		}
	}
	if terr := c.Thaw(); terr != nil && ferr == nil {
		err = errors.Join(err, terr)
	}
	return err
}

// Processes lists the processes in the cgroup and below.
func (c *Cgroup) Processes() ([]int, error) {
	dir := c.dirs[0].path
	if d, err := c.controllerDir("freezer"); err == nil {
		dir = d
	}
	return processes(dir)
}

func processes(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return err
		}
		for _, f := range strings.Fields(string(text)) {
			if n, err := strconv.Atoi(f); err == nil && n > 0 {
				pids = append(pids, n)
			}
		}
		return nil
	})
	return pids, err
}
