package embedded

import (
	"slices"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// lostByFork tells whether a script that forks would lose the scheduling policy
// that it set itself, or could not fork any more (sched(7): a child gets back to
// SCHED_OTHER with the flag, and none may be made by SCHED_DEADLINE without it).
// Where the last fork is, the script has no privileges left to set it: the
// runtime does, while the script waits.
func lostByFork(p *specs.Process) bool {
	s := p.Scheduler
	return s != nil && (s.Policy == specs.SchedDeadline || slices.Contains(s.Flags, specs.SchedFlagResetOnFork))
}

// holdForScheduler appends a wait for the runtime to set the policy, after the
// last fork. in is where the script waits.
func (s *script) holdForScheduler(p *specs.Process, in childFD) {
	if lostByFork(p) {
		at, _ := s.message(msgSched)
		s.tell(at)
		s.wait(in)
	}
}

// setScheduler gives process pid, a child of ours, the scheduling policy of p.
func setScheduler(pid int, p *specs.Process) error {
	attr, err := schedAttr(p.Scheduler)
	if err != nil {
		return err
	}
	if _, _, e := unix.Syscall(unix.SYS_SCHED_SETATTR, uintptr(pid), uintptr(unsafe.Pointer(&attr[0])), 0); e != 0 {
		if e == unix.EPERM && p.Scheduler.Policy == specs.SchedDeadline {
			return invalid("process.scheduler: %w: SCHED_DEADLINE wants CAP_SYS_NICE and every CPU: leave out linux.resources.cpu.cpus", e)
		}
		return invalid("process.scheduler: %w", e)
	}
	return nil
}
