package embedded

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// capSets are the five capability sets of a process, as bit masks.
type capSets struct {
	bounding, effective, permitted, inheritable, ambient uint64
}

// capNumbers is the kernel's numbering (linux/capability.h).
var capNumbers = func() map[string]int {
	names := strings.Fields("CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP" +
		" LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE" +
		" SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME" +
		" SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG" +
		" WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE")
	m := make(map[string]int, len(names))
	for i, n := range names {
		m["CAP_"+n] = i
	}
	return m
}()

// lastCap is the highest capability Berth knows (CHECKPOINT_RESTORE).
const lastCap = 40

// ownCaps reads what this process may hand on.
func ownCaps() (capSets, error) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return capSets{}, err
	}
	defer f.Close()
	var c capSets
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		name, value, _ := strings.Cut(sc.Text(), ":")
		var to *uint64
		switch name {
		case "CapBnd":
			to = &c.bounding
		case "CapPrm":
			to = &c.permitted
		case "CapEff":
			to = &c.effective
		default:
			continue
		}
		if *to, err = strconv.ParseUint(strings.TrimSpace(value), 16, 64); err != nil {
			return capSets{}, fmt.Errorf("/proc/self/status: %s: %w", name, err)
		}
	}
	return c, sc.Err()
}

// capsOf turns the spec's sets into masks, limited to what own can give; what
// it can not give is a warning. A missing object is five empty sets.
func capsOf(l *specs.LinuxCapabilities, own capSets) (c capSets, warnings []string, err error) {
	if l == nil {
		return c, nil, nil
	}
	var lost uint64
	limit := own.bounding & own.permitted
	for _, s := range []struct {
		name string
		in   []string
		to   *uint64
	}{
		{"bounding", l.Bounding, &c.bounding}, {"effective", l.Effective, &c.effective},
		{"permitted", l.Permitted, &c.permitted}, {"inheritable", l.Inheritable, &c.inheritable},
		{"ambient", l.Ambient, &c.ambient},
	} {
		for _, n := range s.in {
			i, ok := capNumbers[n]
			if !ok { // runtime-spec: a warning, no failure
				warnings = append(warnings, fmt.Sprintf("process.capabilities.%s: ignoring unknown capability %q", s.name, n))
				continue
			}
			*s.to |= 1 << i
		}
		lost |= *s.to &^ limit
		*s.to &= limit
	}
	// The kernel's rules: effective within permitted, ambient within both others.
	if x := c.effective &^ c.permitted; x != 0 {
		return c, nil, invalid("process.capabilities.effective: not within permitted: %s", capList(x))
	}
	if x := c.ambient &^ (c.permitted & c.inheritable); x != 0 {
		warnings = append(warnings, "process.capabilities.ambient: can't raise ambient capability "+capList(x)+": not within permitted and inheritable")
		c.ambient &^= x
	}
	if lost != 0 {
		warnings = append(warnings, "process.capabilities: the runtime itself lacks "+capList(lost))
	}
	return c, warnings, nil
}

func capList(mask uint64) string {
	var out []string
	for i := range lastCap + 1 {
		if mask&(1<<i) == 0 {
			continue
		}
		for n, k := range capNumbers {
			if k == i {
				out = append(out, n)
			}
		}
	}
	return strings.Join(out, " ")
}

// capData is the argument of capset(2).
func (c capSets) capData(extra uint64) []byte {
	e, p, i := c.effective|extra, c.permitted|extra, c.inheritable
	d := [2]unix.CapUserData{
		{Effective: uint32(e), Permitted: uint32(p), Inheritable: uint32(i)},
		{Effective: uint32(e >> 32), Permitted: uint32(p >> 32), Inheritable: uint32(i >> 32)},
	}
	return bytesOf(&d)
}

// kernelCaps are all capabilities of the running kernel, which may know more than
// Berth does: a new user namespace has them all.
var kernelCaps = sync.OnceValue(func() uint64 {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n < 63 {
			return 1<<(n+1) - 1
		}
	}
	return 1<<(lastCap+1) - 1
})
