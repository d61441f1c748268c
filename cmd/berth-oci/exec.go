package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/embedded/state"
)

// execFailed is the exit code of an exec whose program did not run, so that it
// is not taken for the program's.
const execFailed = 255

// further is what exec was asked for.
type further struct {
	connect      connections
	processFile  string
	cwd          string
	env          []string
	tty          bool
	user         string
	gids         []int64
	caps         []string
	noNewPrivs   bool
	privsSet     bool
	label        string
	apparmor     string
	detach       bool
	pidFile      string
	preserveFDs  int
	cgroups      []string
	ignorePaused bool
}

func (a *app) execCommand() *cobra.Command {
	x := &further{}
	c := &cobra.Command{
		Use:   "exec ID COMMAND [ARG...]",
		Short: "Run a further process in a container",
		Args: func(cmd *cobra.Command, args []string) error {
			if err := between(1, -1)(cmd, args); err != nil {
				return &failure{execFailed, err}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			x.privsSet = cmd.Flags().Changed("no-new-privs")
			err := a.exec(cmd.Context(), args[0], args[1:], x)
			var exit exitStatus
			if err != nil && !errors.As(err, &exit) {
				return &failure{execFailed, fmt.Errorf("exec failed: %w", err)}
			}
			return err
		},
	}
	f := c.Flags()
	f.SetInterspersed(false) // what follows the id is the command's
	x.connect.flags(c)
	f.StringVarP(&x.processFile, "process", "p", "", "file with the process, as the config's process is")
	f.StringVar(&x.cwd, "cwd", "", "working directory in the container")
	f.StringArrayVarP(&x.env, "env", "e", nil, "further environment variable: NAME=VALUE")
	f.BoolVarP(&x.tty, "tty", "t", false, "give the process a terminal")
	f.StringVarP(&x.user, "user", "u", "", "user: UID[:GID]")
	f.Int64SliceVarP(&x.gids, "additional-gids", "g", nil, "further groups")
	f.StringArrayVarP(&x.caps, "cap", "c", nil, "further capability")
	f.BoolVar(&x.noNewPrivs, "no-new-privs", false, "the process can gain no privileges")
	f.StringVar(&x.label, "process-label", "", "SELinux label of the process")
	f.StringVar(&x.apparmor, "apparmor", "", "AppArmor profile of the process")
	f.BoolVarP(&x.detach, "detach", "d", false, "do not wait for the process's end")
	f.StringVar(&x.pidFile, "pid-file", "", "file to write the process's pid to")
	f.IntVar(&x.preserveFDs, "preserve-fds", 0, "how many further descriptors to pass on")
	f.StringArrayVar(&x.cgroups, "cgroup", nil, "cgroup below the container's to run in: [CONTROLLER[,...]:]PATH")
	f.BoolVar(&x.ignorePaused, "ignore-paused", false, "do not refuse a paused container; the process waits for its end")
	return c
}

func (a *app) exec(ctx context.Context, name string, args []string, x *further) (err error) {
	d, r, status, err := a.opened(name)
	if err != nil {
		return err
	}
	switch {
	case status == state.Stopped:
		return fmt.Errorf("%s: cannot exec in a stopped container", name)
	case status == state.Creating:
		return fmt.Errorf("%s: cannot exec in a container that is being created", name)
	case status == state.Paused && !x.ignorePaused:
		return fmt.Errorf("%s: cannot exec in a paused container (use --ignore-paused to override)", name)
	}
	p, err := x.process(d, args)
	if err != nil {
		return err
	}
	setEnv(p, fmt.Sprintf("/proc/%d/root", r.Saved.Pid))
	if err := x.connect.check(p.Terminal, x.detach); err != nil {
		return err
	}
	if x.pidFile != "" {
		if x.pidFile, err = filepath.Abs(x.pidFile); err != nil {
			return fmt.Errorf("--pid-file: %w", err)
		}
	}
	extra, err := a.preserved(firstFile, x.preserveFDs)
	if err != nil {
		return err
	}
	if err := x.connect.open(); err != nil {
		return err
	}
	defer x.connect.close()
	rt, c, err := a.reopen(d, r)
	if err != nil {
		return err
	}
	defer rt.Close()
	if len(x.cgroups) > 0 {
		if err := c.ExecBelow(x.cgroups...); err != nil {
			return fmt.Errorf("--cgroup: bad sub cgroup path: %w", err)
		}
	}
	a.log.Debug("exec", "container", name, "program", p.Args[0])
	var att *attachment
	if !x.detach {
		att = attach(false)
		defer att.release()
	}
	proc, err := x.run(ctx, c, p, att, extra)
	if err != nil {
		return err
	}
	defer proc.PidFD.Close()
	if x.detach {
		return nil
	}
	code, err := att.wait(proc)
	if err != nil {
		return err
	}
	return exitStatus(code)
}

// run starts the process and hands out what belongs to it.
func (x *further) run(ctx context.Context, c *embedded.Container, p *specs.Process, att *attachment, extra []*os.File) (proc oci.Process, err error) {
	io, err := att.stdio(p.Terminal)
	if err != nil {
		return proc, err
	}
	io.Extra = extra
	if proc, err = c.Exec(ctx, p, io); err != nil {
		return proc, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, end(proc))
		}
	}()
	if err := x.connect.hand(proc, x.detach); err != nil {
		return proc, err
	}
	if err := att.console(proc); err != nil {
		return proc, err
	}
	if x.pidFile != "" {
		return proc, writePid(x.pidFile, proc.Pid)
	}
	return proc, nil
}

// process is the one in --process, or the container's own with what the flags change.
func (x *further) process(d *state.Dir, args []string) (*specs.Process, error) {
	if x.processFile != "" {
		return readProcess(x.processFile)
	}
	if len(args) == 0 {
		return nil, errors.New("exec args cannot be empty")
	}
	s, err := d.LoadSpec()
	if err != nil {
		return nil, err
	}
	p := s.Process
	p.Args, p.Terminal, p.ConsoleSize = args, x.tty, nil
	if x.cwd != "" {
		p.Cwd = x.cwd
	}
	if x.label != "" {
		p.SelinuxLabel = x.label
	}
	if x.apparmor != "" {
		p.ApparmorProfile = x.apparmor
	}
	if x.privsSet {
		p.NoNewPrivileges = x.noNewPrivs
	}
	p.Env = append(p.Env, x.env...)
	x.addCaps(p)
	if err := x.setUser(p); err != nil {
		return nil, err
	}
	return p, checkProcess(p)
}

func readProcess(name string) (*specs.Process, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("--process: %w", err)
	}
	defer f.Close()
	b, err := readBounded(f)
	if err != nil {
		return nil, fmt.Errorf("--process %s: %w", name, err)
	}
	var p *specs.Process
	if err := decode(b, &p); err != nil {
		return nil, fmt.Errorf("--process %s: %w", name, err)
	}
	if err := checkProcess(p); err != nil {
		return nil, fmt.Errorf("--process %s: %w", name, err)
	}
	return p, nil
}

// addCaps adds to the sets that --cap means. Ambient ones must be inheritable
// too, which the flag does not make them.
func (x *further) addCaps(p *specs.Process) {
	if len(x.caps) == 0 {
		return
	}
	if p.Capabilities == nil {
		p.Capabilities = &specs.LinuxCapabilities{}
	}
	c := p.Capabilities
	c.Bounding = append(c.Bounding, x.caps...)
	c.Effective = append(c.Effective, x.caps...)
	c.Permitted = append(c.Permitted, x.caps...)
	if c.Inheritable != nil {
		c.Ambient = append(c.Ambient, x.caps...)
	}
}

func (x *further) setUser(p *specs.Process) error {
	if x.user != "" {
		uid, gid, hasGID := strings.Cut(x.user, ":")
		n, err := strconv.ParseUint(uid, 10, 32)
		if err != nil {
			return fmt.Errorf("--user %q: bad uid: want UID[:GID] as numbers", x.user)
		}
		p.User.UID = uint32(n)
		if hasGID {
			if n, err = strconv.ParseUint(gid, 10, 32); err != nil {
				return fmt.Errorf("--user %q: bad gid: want UID[:GID] as numbers", x.user)
			}
			p.User.GID = uint32(n)
		}
	}
	for _, g := range x.gids {
		if g < 0 || g > 1<<32-2 {
			return fmt.Errorf("--additional-gids %d: must be a positive number of a group", g)
		}
		p.User.AdditionalGids = append(p.User.AdditionalGids, uint32(g))
	}
	return nil
}
