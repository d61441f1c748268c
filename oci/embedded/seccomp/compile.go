// Package seccomp compiles an OCI seccomp profile to classic BPF and hands the
// listener of a notifying filter to its agent. The kernel runs a new filter once
// for every system call number to fill its cache, so the depth of the filter is
// what loading costs: the numbers are put in a balanced tree of ranges.
package seccomp

import (
	"fmt"
	"path"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Filter is a program for seccomp(SECCOMP_SET_MODE_FILTER, Flags, ...). With
// Listener the call returns a descriptor, close-on-exec, that takes the
// notifications; it belongs to whoever listens at linux.seccomp.listenerPath
// (SendListener).
type Filter struct {
	Prog     []unix.SockFilter
	Flags    int
	Listener bool
}

const maxInsns = 4096 // BPF_MAXINSNS

const (
	offNR   = 0
	offArch = 4
	offArgs = 16
	x32Bit  = 0x40000000
)

// flagTSYNC is in the specification but not among its Go constants.
const flagTSYNC specs.LinuxSeccompFlag = "SECCOMP_FILTER_FLAG_TSYNC"

// Compile translates linux.seccomp (runtime-spec, "Seccomp"). The rules for a
// call are tried in the profile's order, those with conditions before those
// without; of several without conditions the first counts that is not the
// default action.
//
// Names that no listed architecture has are ignored, as profiles name the calls
// of all kernels. Under a default that refuses, a call newer than all that the
// profile names gets ENOSYS, so that C libraries fall back to older calls; with
// SCMP_ACT_TRACE the tracer decides.
//
// A profile that notifies must let the starting process report its listener:
// see checkNotify. SECCOMP_FILTER_FLAG_TSYNC has nothing to do, as the loading
// process has one thread.
func Compile(p *specs.LinuxSeccomp) (*Filter, error) {
	def, err := action(p.DefaultAction, p.DefaultErrnoRet, "linux.seccomp.defaultAction", "linux.seccomp.defaultErrnoRet")
	if err != nil {
		return nil, err
	}
	arches, err := listed(p.Architectures)
	if err != nil {
		return nil, err
	}
	rules, err := gather(p)
	if err != nil {
		return nil, err
	}
	f := &Filter{}
	if f.Listener, err = checkNotify(p, rules, def); err != nil {
		return nil, err
	}
	if f.Flags, err = flags(p.Flags, f.Listener); err != nil {
		return nil, err
	}
	f.Prog = []unix.SockFilter{load(offArch)}
	for _, a := range arches {
		body := a.body(rules, def)
		f.Prog = append(f.Prog, unlessEqual(a.audit, len(body))...)
		f.Prog = append(f.Prog, body...)
	}
	// A process of an architecture the profile does not list is not let through.
	f.Prog = append(f.Prog, ret(unix.SECCOMP_RET_KILL_PROCESS))
	if len(f.Prog) > maxInsns {
		return nil, fmt.Errorf("linux.seccomp: the profile needs %d instructions, the kernel takes %d; use fewer rules with args: %w", len(f.Prog), maxInsns, errdefs.ErrInvalidArgument)
	}
	return f, nil
}

func flags(names []specs.LinuxSeccompFlag, listener bool) (int, error) {
	out := 0
	if listener {
		out |= unix.SECCOMP_FILTER_FLAG_NEW_LISTENER
	}
	for i, fl := range names {
		switch fl {
		case specs.LinuxSeccompFlagLog:
			out |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			out |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case specs.LinuxSeccompFlagWaitKillableRecv:
			if !listener { // EINVAL of the kernel
				return 0, fmt.Errorf("linux.seccomp.flags[%d] %q: no rule has action SCMP_ACT_NOTIFY; remove the flag: %w", i, fl, errdefs.ErrInvalidArgument)
			}
			out |= unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
		case flagTSYNC:
		default:
			return 0, fmt.Errorf("linux.seccomp.flags[%d] %q: unknown: %w", i, fl, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

// action is the kernel's word for an action. Only SCMP_ACT_ERRNO and
// SCMP_ACT_TRACE take a number, EPERM if there is none.
func action(a specs.LinuxSeccompAction, number *uint, field, numberField string) (uint32, error) {
	data, limit := uint32(unix.EPERM), uint(0)
	switch a {
	case specs.ActErrno:
		limit = 4095 // MAX_ERRNO: the kernel would cut off more
	case specs.ActTrace:
		limit = 0xffff
	default:
		if number != nil {
			return 0, fmt.Errorf("%s %d: action %s has no errno; remove it: %w", numberField, *number, a, errdefs.ErrInvalidArgument)
		}
	}
	if number != nil {
		if *number > limit {
			return 0, fmt.Errorf("%s %d: want 0 to %d: %w", numberField, *number, limit, errdefs.ErrInvalidArgument)
		}
		data = uint32(*number)
	}
	switch a {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActErrno:
		return unix.SECCOMP_RET_ERRNO | data, nil
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActTrace:
		return unix.SECCOMP_RET_TRACE | data, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActNotify:
		return unix.SECCOMP_RET_USER_NOTIF, nil
	}
	return 0, fmt.Errorf("%s %q: unknown: %w", field, a, errdefs.ErrInvalidArgument)
}

// checkNotify reports whether the profile notifies, and refuses what could not
// work. Between the load of such a filter and its execve the starting process
// writes the number of the listener to the runtime and reads its answer. So
// "write" must be allowed: nobody could serve a notification before the listener
// is known. "read" may be notified, as the agent has the listener by then.
func checkNotify(p *specs.LinuxSeccomp, rules []rule, def uint32) (bool, error) {
	if p.ListenerMetadata != "" && p.ListenerPath == "" {
		return false, fmt.Errorf("linux.seccomp.listenerMetadata: set without linux.seccomp.listenerPath; remove it or name the agent's socket: %w", errdefs.ErrInvalidArgument)
	}
	if def == unix.SECCOMP_RET_USER_NOTIF {
		return false, fmt.Errorf("linux.seccomp.defaultAction: SCMP_ACT_NOTIFY cannot be used as default action; notify for the calls that the agent serves: %w", errdefs.ErrInvalidArgument)
	}
	var write, read []choice
	notifies := false
	for _, r := range rules {
		notifies = notifies || r.ret == unix.SECCOMP_RET_USER_NOTIF
		switch r.name {
		case "write":
			if r.ret == unix.SECCOMP_RET_USER_NOTIF {
				return false, fmt.Errorf("linux.seccomp.syscalls: SCMP_ACT_NOTIFY cannot be used for the write syscall, by which a starting process reports its listener: %w", errdefs.ErrInvalidArgument)
			}
			write = append(write, r.choice)
		case "read":
			read = append(read, r.choice)
		}
	}
	if !notifies {
		return false, nil // listenerPath is ignored
	}
	if !path.IsAbs(p.ListenerPath) {
		return false, fmt.Errorf("linux.seccomp.listenerPath %q: want the absolute path of the agent's socket, as a rule has action SCMP_ACT_NOTIFY (seccomp listenerPath is not set): %w", p.ListenerPath, errdefs.ErrInvalidArgument)
	}
	for _, x := range []struct {
		name    string
		choices []choice
		notify  bool
	}{{"write", write, false}, {"read", read, true}} {
		rets := []uint32{unconditional(x.choices, def)}
		for _, c := range x.choices {
			if len(c.conds) > 0 {
				rets = append(rets, c.ret)
			}
		}
		for _, r := range rets {
			if r != unix.SECCOMP_RET_ALLOW && r != unix.SECCOMP_RET_LOG && (r != unix.SECCOMP_RET_USER_NOTIF || !x.notify) {
				return false, fmt.Errorf("linux.seccomp.syscalls: %q must be allowed when a rule has action SCMP_ACT_NOTIFY: a starting process reports its listener and waits with it: %w", x.name, errdefs.ErrInvalidArgument)
			}
		}
	}
	return true, nil
}
