package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"encoding/json"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"

	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/embedded/state"
)

// on runs f on a container whose status allows it.
func (a *app) on(name string, f func(*embedded.Container, state.Record) error) error {
	d, r, _, err := a.opened(name)
	if err != nil {
		return err
	}
	rt, c, err := a.reopen(d, r)
	if err != nil {
		return err
	}
	defer rt.Close()
	return f(c, r)
}

func (a *app) pauseCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "pause ID",
		Short: "Freeze all processes of a container",
		Args:  exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.limits(args[0], func(c *embedded.Container, status state.Status) error {
				if status != state.Running && status != state.Created {
					return fmt.Errorf("%s: container not running or created: %s", args[0], status)
				}
				return c.Pause()
			})
		},
	}
}

func (a *app) resumeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "resume ID",
		Short: "Let the processes of a paused container go on",
		Args:  exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.limits(args[0], func(c *embedded.Container, status state.Status) error {
				if status != state.Paused {
					return fmt.Errorf("%s: container not paused: %s", args[0], status)
				}
				return c.Resume()
			})
		},
	}
}

// limits runs f with other changes of the container's cgroup kept away.
func (a *app) limits(name string, f func(*embedded.Container, state.Status) error) error {
	d, err := a.states().Open(name)
	if err != nil {
		return err
	}
	if _, err := d.Load(); err != nil { // no lock file where no container is
		return err
	}
	unlock, err := d.LockLimits()
	if err != nil {
		return err
	}
	defer unlock()
	r, err := d.Load()
	if err != nil {
		return err
	}
	status, err := d.Status(r)
	if err != nil {
		return err
	}
	rt, c, err := a.reopen(d, r)
	if err != nil {
		return err
	}
	defer rt.Close()
	return f(c, status)
}

func (a *app) psCommand() *cobra.Command {
	format := "table"
	c := &cobra.Command{
		Use:   "ps ID [PS-OPTION...]",
		Short: "List the processes of a container",
		Args:  between(1, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("--format %q: want table or json", format)
			}
			var pids []int
			err := a.on(args[0], func(c *embedded.Container, _ state.Record) (err error) {
				pids, err = c.Processes()
				return err
			})
			if err != nil {
				return err
			}
			if format == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(append([]int{}, pids...))
			}
			return printProcesses(cmd, pids, args[1:])
		},
	}
	c.Flags().SetInterspersed(false) // what follows the id is for ps
	c.Flags().StringVarP(&format, "format", "f", "table", "table or json")
	return c
}

// printProcesses prints the lines of ps that belong to pids.
func printProcesses(cmd *cobra.Command, pids []int, options []string) error {
	if len(options) == 0 {
		options = []string{"-ef"}
	}
	out, err := exec.Command("ps", options...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ps: %w: %s", err, strings.TrimSpace(string(out)))
	}
	head, rest, _ := strings.Cut(string(out), "\n")
	column := slices.Index(strings.Fields(head), "PID")
	if column < 0 {
		return errors.New("couldn't find PID field in ps output; use options that print it")
	}
	w := cmd.OutOrStdout()
	fmt.Fprintln(w, head)
	for line := range strings.Lines(rest) {
		f := strings.Fields(line)
		if len(f) <= column {
			continue
		}
		pid, err := strconv.Atoi(f[column])
		if err != nil {
			return fmt.Errorf("ps: %q is no pid", f[column])
		}
		if slices.Contains(pids, pid) {
			fmt.Fprint(w, line)
		}
	}
	return nil
}

// limitFlags are the flags of update, in their order on the command line's help.
var limitFlags = []struct {
	name, usage string
	set         func(r *specs.LinuxResources, v string) error
}{
	{"blkio-weight", "weight of block IO, 10 to 1000", func(r *specs.LinuxResources, v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		if w := uint16(n); n != 0 {
			r.BlockIO = &specs.LinuxBlockIO{Weight: &w}
		}
		return err
	}},
	{"cpu-period", "period of the CPU quota in microseconds", unsigned(func(r *specs.LinuxResources) **uint64 { return &cpu(r).Period })},
	{"cpu-quota", "CPU time in a period, in microseconds; -1 is no limit", signed(func(r *specs.LinuxResources) **int64 { return &cpu(r).Quota })},
	{"cpu-burst", "CPU time that may be saved up, in microseconds", unsigned(func(r *specs.LinuxResources) **uint64 { return &cpu(r).Burst })},
	{"cpu-share", "CPU shares", unsigned(func(r *specs.LinuxResources) **uint64 { return &cpu(r).Shares })},
	{"cpu-rt-period", "period of the realtime CPU quota in microseconds", unsigned(func(r *specs.LinuxResources) **uint64 { return &cpu(r).RealtimePeriod })},
	{"cpu-rt-runtime", "realtime CPU time in a period, in microseconds", signed(func(r *specs.LinuxResources) **int64 { return &cpu(r).RealtimeRuntime })},
	{"cpu-idle", "1: run only when nobody else does; 0: as usual", signed(func(r *specs.LinuxResources) **int64 { return &cpu(r).Idle })},
	{"cpuset-cpus", "CPUs to use", func(r *specs.LinuxResources, v string) error { cpu(r).Cpus = v; return nil }},
	{"cpuset-mems", "memory nodes to use", func(r *specs.LinuxResources, v string) error { cpu(r).Mems = v; return nil }},
	{"kernel-memory", "ignored", ignored},
	{"kernel-memory-tcp", "ignored", ignored},
	{"memory", "memory limit in bytes; -1 is no limit", size(func(r *specs.LinuxResources) **int64 { return &memory(r).Limit })},
	{"memory-reservation", "memory that is kept longest, in bytes", size(func(r *specs.LinuxResources) **int64 { return &memory(r).Reservation })},
	{"memory-swap", "limit of memory and swap together, in bytes; -1 is no limit", size(func(r *specs.LinuxResources) **int64 { return &memory(r).Swap })},
	{"pids-limit", "most processes; -1 is no limit", func(r *specs.LinuxResources, v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		r.Pids = &specs.LinuxPids{Limit: &n}
		return err
	}},
}

func (a *app) updateCommand() *cobra.Command {
	file, l3Cache, memBw := "", "", ""
	values := make([]string, len(limitFlags))
	c := &cobra.Command{
		Use:   "update ID",
		Short: "Change limits of a container",
		Args:  exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var r *specs.LinuxResources
			if file != "" {
				var err error
				if r, err = readResources(cmd, file); err != nil {
					return err
				}
			} else {
				r = &specs.LinuxResources{}
				for i, f := range limitFlags {
					if values[i] == "" {
						continue
					}
					if err := f.set(r, values[i]); err != nil {
						return fmt.Errorf("invalid value for --%s %q: %w", f.name, values[i], err)
					}
				}
			}
			return a.limits(args[0], func(c *embedded.Container, status state.Status) error {
				if status == state.Stopped || status == state.Creating {
					return fmt.Errorf("%s: %w", args[0], state.ErrNotRunning)
				}
				if l3Cache != "" || memBw != "" {
					if err := c.UpdateRDT(l3Cache, memBw); err != nil {
						return err
					}
				}
				return c.Update(r)
			})
		},
	}
	c.Flags().StringVarP(&file, "resources", "r", "", "file with a linux.resources object, or - for stdin; other flags are ignored then")
	c.Flags().StringVar(&l3Cache, "l3-cache-schema", "", "Intel RDT: parts of the L3 cache to use, such as \"L3:0=7f0;1=1f\"")
	c.Flags().StringVar(&memBw, "mem-bw-schema", "", "Intel RDT: memory bandwidth, such as \"MB:0=20;1=70\"")
	for i, f := range limitFlags {
		c.Flags().StringVar(&values[i], f.name, "", f.usage)
		if strings.HasPrefix(f.name, "kernel-") {
			_ = c.Flags().MarkHidden(f.name) // fails for unknown flags only
		}
	}
	return c
}

func readResources(cmd *cobra.Command, name string) (*specs.LinuxResources, error) {
	in := cmd.InOrStdin()
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("--resources: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := readBounded(in)
	if err != nil {
		return nil, fmt.Errorf("--resources: %w", err)
	}
	var r specs.LinuxResources
	if err := decode(b, &r); err != nil {
		return nil, fmt.Errorf("--resources: %w", err)
	}
	r.Devices = nil // the rules of devices are made with the container and stay
	return &r, nil
}

func cpu(r *specs.LinuxResources) *specs.LinuxCPU {
	if r.CPU == nil {
		r.CPU = &specs.LinuxCPU{}
	}
	return r.CPU
}

func memory(r *specs.LinuxResources) *specs.LinuxMemory {
	if r.Memory == nil {
		r.Memory = &specs.LinuxMemory{}
	}
	return r.Memory
}

func unsigned(field func(*specs.LinuxResources) **uint64) func(*specs.LinuxResources, string) error {
	return func(r *specs.LinuxResources, v string) error {
		n, err := strconv.ParseUint(v, 10, 64)
		*field(r) = &n
		return err
	}
}

func signed(field func(*specs.LinuxResources) **int64) func(*specs.LinuxResources, string) error {
	return func(r *specs.LinuxResources, v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		*field(r) = &n
		return err
	}
}

func size(field func(*specs.LinuxResources) **int64) func(*specs.LinuxResources, string) error {
	return func(r *specs.LinuxResources, v string) error {
		n, err := parseSize(v)
		*field(r) = &n
		return err
	}
}

func ignored(*specs.LinuxResources, string) error { return nil }

// parseSize reads a number of bytes with an optional unit: k, M, G, T, P, all
// powers of 1024, with or without "B" or "iB".
func parseSize(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	digits := strings.TrimRight(s, "bBiIkKmMgGtTpP ")
	unit := strings.ToLower(strings.TrimSpace(s[len(digits):]))
	unit = strings.TrimSuffix(strings.TrimSuffix(unit, "b"), "i")
	shift := strings.Index("kmgtp", unit)
	if len(unit) > 1 || shift < 0 {
		return 0, errors.New("want a number with a unit of k, m, g, t or p")
	}
	factor := int64(1)
	if unit != "" {
		factor = 1 << (10 * (shift + 1))
	}
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil || !(n >= 0 && n*float64(factor) < 1<<63) { // nor NaN
		return 0, errors.New("want a number of bytes such as 64m")
	}
	return int64(n * float64(factor)), nil
}
