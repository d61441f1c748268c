package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// processes finds a runtime's own processes afresh at each look: some runtimes
// start one per pod.
type processes struct {
	names  []string // base names or absolute paths of executables
	within string   // text that the command line or the executable's path must have
	pids   []int    // fixed, instead of names
}

func newProcesses(match, within, pids string) (*processes, error) {
	p := &processes{within: within}
	for f := range strings.SplitSeq(pids, ",") {
		if f = strings.TrimSpace(f); f == "" {
			continue
		}
		n, err := strconv.Atoi(f)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("--pids %q: want process numbers separated by commas", pids)
		}
		p.pids = append(p.pids, n)
	}
	for f := range strings.SplitSeq(match, ",") {
		if f = strings.TrimSpace(f); f != "" {
			p.names = append(p.names, f)
		}
	}
	return p, nil
}

// given tells whether there is anything to watch.
func (p *processes) given() bool { return len(p.names)+len(p.pids) > 0 }

// find returns the runtime's processes now.
func (p *processes) find() []int {
	if len(p.pids) > 0 {
		return p.pids
	}
	if len(p.names) == 0 {
		return nil
	}
	var found []int
	for _, pid := range allPids() {
		exe, err := os.Readlink(procFile(pid, "exe"))
		if err != nil || !p.matches(strings.TrimSuffix(exe, " (deleted)")) {
			continue
		}
		if p.within != "" && !strings.Contains(exe, p.within) {
			line, err := os.ReadFile(procFile(pid, "cmdline"))
			if err != nil || !bytes.Contains(line, []byte(p.within)) {
				continue
			}
		}
		found = append(found, pid)
	}
	return found
}

func (p *processes) matches(exe string) bool {
	for _, n := range p.names {
		if exe == n || filepath.Base(exe) == n {
			return true
		}
	}
	return false
}

func allPids() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

func procFile(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

// memory is proportional set size in bytes.
type memory struct {
	runtime int64 // the runtime's own processes
	pause   int64 // children of theirs that run /pause: one per pod in some runtimes
}

func (p *processes) memory() (memory, error) {
	own := map[int]bool{}
	var m memory
	for _, pid := range p.find() {
		own[pid] = true
		n, err := pss(pid)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return m, err
		}
		m.runtime += n
	}
	if len(own) == 0 {
		return m, fmt.Errorf("--match %s, --within %q: no such process", strings.Join(p.names, ","), p.within)
	}
	for _, pid := range allPids() {
		if exe, err := os.Readlink(procFile(pid, "exe")); err != nil || exe != "/pause" {
			continue
		}
		if st, err := readStat(pid); err != nil || !own[st.parent] {
			continue
		}
		if n, err := pss(pid); err == nil {
			m.pause += n
		}
	}
	return m, nil
}

func pss(pid int) (int64, error) {
	b, err := os.ReadFile(procFile(pid, "smaps_rollup"))
	if err != nil {
		return 0, err
	}
	return parsePSS(b)
}

func parsePSS(b []byte) (int64, error) {
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pss:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("smaps_rollup without a Pss line")
}

// usage is the CPU time of each process so far.
type usage map[int]used

type used struct {
	self     time.Duration
	children time.Duration // of children that it has waited for
}

func (p *processes) cpu() usage {
	u := usage{}
	for _, pid := range p.find() {
		st, err := readStat(pid)
		if err != nil {
			continue
		}
		self, err := cpuClock(pid)
		if err != nil {
			continue
		}
		u[pid] = used{self: self, children: st.children}
	}
	return u
}

// since sums what the processes of u used after before. One that was not there
// before counts whole; what one used that has gone since is not seen.
func (u usage) since(before usage) used {
	var sum used
	for pid, now := range u {
		sum.self += now.self - before[pid].self
		sum.children += now.children - before[pid].children
	}
	return sum
}

// cpuClock reads the CPU clock of a whole process in nanoseconds, where
// /proc/PID/stat counts in ticks of 10 ms. The clock's number is made of the
// process's as clock_getcpuclockid(3) does.
func cpuClock(pid int) (time.Duration, error) {
	const scheduler = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduler), &ts); err != nil {
		return 0, err
	}
	return time.Duration(ts.Nano()), nil
}

type stat struct {
	parent   int
	children time.Duration
}

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile(procFile(pid, "stat"))
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads proc_pid_stat(5). The name in its second field may hold
// anything, brackets and spaces too, so fields are counted from its last bracket.
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 15 {
		return stat{}, fmt.Errorf("process stat %q: too few fields", b)
	}
	parent, err1 := strconv.Atoi(f[1])
	user, err2 := strconv.ParseInt(f[13], 10, 64)
	system, err3 := strconv.ParseInt(f[14], 10, 64)
	if err1 != nil || err2 != nil || err3 != nil {
		return stat{}, fmt.Errorf("process stat %q: not numbers", b)
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go has
	return stat{parent: parent, children: time.Duration(user+system) * tick}, nil
}
