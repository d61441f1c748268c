package embedded

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// probe is the program in the containers. Each argument is "verb:operand"; it
// prints "verb:operand result" for each.
func probe(args []string) {
	for _, a := range args {
		verb, x, _ := strings.Cut(a, ":")
		fmt.Printf("%s %s\n", a, act(verb, x))
	}
}

func act(verb, x string) string {
	switch verb {
	case "read":
		b, err := os.ReadFile(x)
		return text(strings.ReplaceAll(string(b), "\n", "|"), err)
	case "status":
		b, err := os.ReadFile("/proc/self/status")
		for line := range strings.Lines(string(b)) {
			if k, v, _ := strings.Cut(line, ":"); k == x {
				return strings.TrimSpace(v)
			}
		}
		return text("", err)
	case "write":
		return text("ok", os.WriteFile(x, []byte("x"), 0o644))
	case "mknod": // type major minor
		f := strings.Split(x, ",")
		maj, _ := strconv.Atoi(f[1])
		min, _ := strconv.Atoi(f[2])
		mode := uint32(unix.S_IFCHR)
		if f[0] == "b" {
			mode = unix.S_IFBLK
		}
		return text("ok", unix.Mknod("/tmp/node"+x, mode|0o600, int(unix.Mkdev(uint32(maj), uint32(min)))))
	case "open":
		f, err := os.OpenFile(x, os.O_RDWR, 0)
		if err == nil {
			f.Close()
		}
		return text("ok", err)
	case "ls":
		d, err := os.ReadDir(x)
		var names []string
		for _, e := range d {
			names = append(names, e.Name())
		}
		return text(strings.Join(names, ","), err)
	case "fds":
		d, err := os.ReadDir("/proc/self/fd")
		var names []string
		for _, e := range d {
			l, err := os.Readlink("/proc/self/fd/" + e.Name())
			if err != nil || strings.HasPrefix(l, "anon_inode:[event") || strings.HasPrefix(l, "/proc/") || strings.HasPrefix(l, "/sys/fs/cgroup/cpu/cpu.cfs") || strings.HasSuffix(l, "/cpu.max") {
				continue // the Go runtime's own, and the directory being read
			}
			if n, _ := strconv.Atoi(e.Name()); n > 2 {
				names = append(names, e.Name()+"="+l)
				continue
			}
			names = append(names, e.Name())
		}
		return text(strings.Join(names, ","), err)
	case "link":
		l, err := os.Readlink(x)
		return text(l, err)
	case "stat":
		var st unix.Stat_t
		err := unix.Stat(x, &st)
		return text(fmt.Sprintf("%o %d:%d %d", st.Mode, unix.Major(st.Rdev), unix.Minor(st.Rdev), st.Uid), err)
	case "hostname":
		h, err := os.Hostname()
		return text(h, err)
	case "id":
		g, err := os.Getgroups()
		return text(fmt.Sprintf("%d %d %v", os.Getuid(), os.Getgid(), g), err)
	case "cwd":
		d, err := os.Getwd()
		return text(d, err)
	case "pid":
		return strconv.Itoa(os.Getpid())
	case "save": // file,variable
		f := strings.Split(x, ",")
		return text("ok", os.WriteFile(f[0], []byte(os.Getenv(f[1])), 0o644))
	case "env":
		return os.Getenv(x)
	case "umask":
		return fmt.Sprintf("%o", unix.Umask(0))
	case "mkdir":
		return text("ok", os.Mkdir(x, 0o755))
	case "tags": // of propagation, of the mount at x
		b, err := os.ReadFile("/proc/self/mountinfo")
		tags := ""
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); f[4] == x {
				tags = strings.Join(f[6:slices.Index(f, "-")], ",")
			}
		}
		return text(tags, err)
	case "mounts":
		b, err := os.ReadFile("/proc/self/mountinfo")
		var at []string
		for line := range strings.Lines(string(b)) {
			at = append(at, strings.Fields(line)[4])
		}
		return text(strings.Join(at, ","), err)
	case "mount": // source target flags
		f := strings.Split(x, ",")
		return text("ok", unix.Mount(f[0], f[1], f[2], 0, ""))
	case "umount":
		return text("ok", unix.Unmount(x, unix.MNT_DETACH))
	case "remount": // target
		return text("ok", unix.Mount("", x, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	case "chown": // file uid gid
		f := strings.Split(x, ",")
		uid, _ := strconv.Atoi(f[1])
		return text("ok", os.Lchown(f[0], uid, uid))
	case "clock": // of CLOCK_BOOTTIME and CLOCK_MONOTONIC, in seconds
		n, _ := strconv.Atoi(x)
		var ts unix.Timespec
		err := unix.ClockGettime(int32(n), &ts)
		return text(strconv.FormatInt(ts.Sec, 10), err)
	case "personality":
		r, _, _ := unix.RawSyscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0)
		return fmt.Sprintf("%#x", r)
	case "policy": // of memory: mode, nodes
		var mode int32
		var mask [16]uint64
		_, _, e := unix.RawSyscall6(unix.SYS_GET_MEMPOLICY, uintptr(unsafe.Pointer(&mode)), uintptr(unsafe.Pointer(&mask)), 1024, 0, 0, 0)
		if e != 0 {
			return e.Error()
		}
		return fmt.Sprintf("%d %d", mode, mask[0])
	case "sched": // policy, nice
		a, err := unix.SchedGetAttr(0, 0)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("%d %d", a.Policy, a.Nice)
	case "ioprio":
		r, _, _ := unix.RawSyscall(unix.SYS_IOPRIO_GET, 1, 0, 0)
		return fmt.Sprintf("%d %d", r>>13, r&0x1fff)
	case "links": // network devices with their addresses
		all, err := net.Interfaces()
		var out []string
		for _, i := range all {
			s := i.Name
			addrs, _ := i.Addrs()
			for _, a := range addrs {
				if p, ok := a.(*net.IPNet); ok && p.IP.IsGlobalUnicast() {
					s += "=" + a.String()
				}
			}
			out = append(out, s)
		}
		return text(strings.Join(out, ","), err)
	case "socket":
		n, _ := strconv.Atoi(x)
		fd, err := unix.Socket(n, unix.SOCK_DGRAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		return text("ok", err)
	case "syscall": // nr,arg...
		var v [7]uintptr
		for i, s := range strings.Split(x, ",") {
			n, _ := strconv.ParseUint(s, 0, 64)
			v[i] = uintptr(n)
		}
		r, _, e := unix.RawSyscall6(v[0], v[1], v[2], v[3], v[4], v[5], v[6])
		if e != 0 {
			return e.Error()
		}
		return strconv.Itoa(int(r))
	case "rlimit":
		n, _ := strconv.Atoi(x)
		var l unix.Rlimit
		err := unix.Prlimit(0, n, nil, &l)
		return text(strconv.FormatUint(l.Max, 10), err)
	case "winsize":
		ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("%dx%d", ws.Row, ws.Col)
	case "eat": // bytes
		n, _ := strconv.Atoi(x)
		b := make([]byte, n)
		for i := 0; i < n; i += 4096 {
			b[i] = 1
		}
		return strconv.Itoa(len(b))
	case "hold":
		time.Sleep(time.Hour)
	case "exit":
		n, _ := strconv.Atoi(x)
		os.Exit(n)
	}
	return "unknown verb"
}

func text(s string, err error) string {
	if err != nil {
		return "error: " + err.Error()
	}
	return s
}
