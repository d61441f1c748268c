package supervisor

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// stat is what a process tree is found by.
type stat struct {
	pid, ppid, session int
	zombie             bool
	started            string // in clock ticks after boot: with pid, the identity of a process
}

// readStat reads /proc/<pid>/stat.
func readStat(pid int) (stat, bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, false
	}
	return parseStat(string(b))
}

// parseStat takes apart "pid (comm) state ppid pgrp session ...". comm is chosen
// by the process and may hold anything, a ")" too.
func parseStat(s string) (stat, bool) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 1 || end < open {
		return stat{}, false
	}
	f := strings.Fields(s[end+1:])
	if len(f) < 20 {
		return stat{}, false
	}
	pid, err1 := strconv.Atoi(strings.TrimSpace(s[:open]))
	ppid, err2 := strconv.Atoi(f[1])
	session, err3 := strconv.Atoi(f[3])
	if err1 != nil || err2 != nil || err3 != nil {
		return stat{}, false
	}
	return stat{pid: pid, ppid: ppid, session: session, zombie: f[0] == "Z" || f[0] == "X", started: f[19]}, true
}

func allStats() []stat {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	out := make([]stat, 0, len(names))
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		if s, ok := readStat(pid); ok {
			out = append(out, s)
		}
	}
	return out
}

// cgroupsOf returns the cgroup of pid in each hierarchy.
func cgroupsOf(pid int) map[string]string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return nil
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 {
			out[f[1]] = f[2]
		}
	}
	return out
}

// within tells whether the process pid is in the cgroups want or below them.
func within(pid int, want map[string]string) bool {
	have := cgroupsOf(pid)
	if have == nil {
		return false
	}
	for hierarchy, path := range want {
		if path == "/" {
			continue
		}
		if h := have[hierarchy]; h != path && !strings.HasPrefix(h, path+"/") {
			return false
		}
	}
	return true
}

// killTree kills the process root with its descendants and with the members of
// their sessions, which an exec's daemonised grandchildren still are after they
// were reparented. Only processes in the cgroups count. It goes on until a look
// at /proc finds none, or d is over.
func killTree(root *process, cgroups map[string]string, d time.Duration) error {
	deadline := time.Now().Add(d)
	victims := map[int]bool{root.pid: true}
	sessions := map[int]bool{}
	for first := true; ; first = false {
		alive := 0
		stats := allStats()
		for grown := true; grown; {
			grown = false
			for _, s := range stats {
				if victims[s.pid] && !sessions[s.session] && victims[s.session] {
					sessions[s.session], grown = true, true
				}
				if !victims[s.pid] && (victims[s.ppid] || sessions[s.session]) {
					victims[s.pid], grown = true, true
				}
			}
		}
		rootExited := root.exited()
		next := map[int]bool{}
		for _, s := range stats {
			if !victims[s.pid] || s.pid == root.pid && rootExited {
				continue
			}
			if s.pid == root.pid {
				_ = root.signal(int(unix.SIGKILL))
			} else if s.zombie || !killMember(s, cgroups) {
				continue
			}
			alive++
			next[s.pid] = true
		}
		if first {
			// The leader of the exec's session is the exec itself: even when it has
			// ended, or been killed just now, its session still names the others.
			sessions[root.pid] = true
			next[root.pid] = true
		} else if alive == 0 && rootExited {
			return nil
		}
		// Pids that are gone may come back as somebody else's: keep the living
		// only. Sessions stay: the kernel does not reuse the number while used.
		next[root.pid] = next[root.pid] && !rootExited
		victims = next
		if time.Now().After(deadline) {
			return unix.ETIMEDOUT
		}
		if !first {
			time.Sleep(2 * time.Millisecond)
		}
	}
}

// killMember kills the process that s describes and reports whether it is one
// to wait for. The pidfd is opened first and the start time is read again, so that
// a pid that was reused meanwhile is left alone. (Its session may have changed:
// a process that was just forked often calls setsid.)
func killMember(s stat, cgroups map[string]string) bool {
	fd, err := unix.PidfdOpen(s.pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	now, ok := readStat(s.pid)
	if !ok || now.started != s.started || !within(s.pid, cgroups) {
		return false
	}
	return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}
