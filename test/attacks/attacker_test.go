package attacks

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/test/pace"
)

// attacker is the program in the containers. Each argument is "verb:operand";
// it answers with a line "verb:operand result", or does not end.
func attacker(args []string) int {
	for _, a := range args {
		verb, x, _ := strings.Cut(a, ":")
		fmt.Printf("%s %s\n", a, act(verb, x))
	}
	return 0
}

// act does one thing. What does not wait on purpose may not hang a test.
func act(verb, x string) string {
	if !slices.Contains([]string{"hold", "swap", "hunt"}, verb) {
		defer time.AfterFunc(pace.Wait(20*time.Second), func() { fmt.Println("hangs"); os.Exit(3) }).Stop()
	}
	f := strings.Split(x, ",")
	switch verb {
	case "nothing":
		return "ok"
	case "status": // a field of /proc/self/status
		b, err := os.ReadFile("/proc/self/status")
		for line := range strings.Lines(string(b)) {
			if k, v, _ := strings.Cut(line, ":"); k == x {
				return strings.Join(strings.Fields(v), " ")
			}
		}
		return text("none", err)
	case "id":
		g, err := os.Getgroups()
		return text(fmt.Sprintf("%d %d %v", os.Getuid(), os.Getgid(), g), err)
	case "read":
		b, err := os.ReadFile(x)
		return text(strings.ReplaceAll(string(b), "\n", "|"), err)
	case "write":
		return text("ok", os.WriteFile(f[0], []byte(strings.Join(f[1:], ",")), 0o644))
	case "open": // for reading and writing
		fd, err := unix.Open(x, unix.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err == nil {
			unix.Close(fd)
		}
		return text("ok", err)
	case "mknod": // TYPE MAJOR MINOR, and opens it
		return mknod(f)
	case "stat":
		var st unix.Stat_t
		err := unix.Stat(x, &st)
		return text(fmt.Sprintf("%o %d:%d %d", st.Mode, unix.Major(st.Rdev), unix.Minor(st.Rdev), st.Uid), err)
	case "fstype":
		var st unix.Statfs_t
		err := unix.Statfs(x, &st)
		return text(fmt.Sprintf("%#x", st.Type), err)
	case "procs": // where procfs is mounted
		b, err := os.ReadFile("/proc/self/mountinfo")
		var at []string
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); strings.Contains(line, " - proc ") {
				at = append(at, f[4])
			}
		}
		return text(strings.Join(at, ","), err)
	case "link":
		l, err := os.Readlink(x)
		return text(l, err)
	case "ls":
		d, err := os.ReadDir(x)
		var names []string
		for _, e := range d {
			names = append(names, e.Name())
		}
		return text(strings.Join(names, ","), err)
	case "env":
		return strings.Join(os.Environ(), "|")
	case "report": // FILE: what a hook is given
		d, err := os.Getwd()
		if err == nil {
			err = os.WriteFile(x, []byte(strings.TrimSpace("env "+strings.Join(os.Environ(), "|"))+"\ncwd "+d+"\nfds "+descriptors()+"\n"), 0o644)
		}
		return text("ok", err)
	case "socket": // FAMILY
		n, _ := strconv.Atoi(x)
		fd, err := unix.Socket(n, unix.SOCK_SEQPACKET, 0)
		if err != nil && n == unix.AF_INET {
			fd, err = unix.Socket(n, unix.SOCK_STREAM, 0)
		}
		if err == nil {
			unix.Close(fd)
		}
		return text("ok", err)
	case "arg": // the length of a variable
		return fmt.Sprint(len(os.Getenv(x)))
	case "cwd":
		d, err := unix.Getwd()
		return text(d, err)
	case "fds":
		return descriptors()
	case "mkdir":
		return text("ok", os.MkdirAll(x, 0o755))
	case "mount": // SOURCE TARGET TYPE DATA
		return text("ok", unix.Mount(f[0], f[1], f[2], 0, strings.Join(f[3:], ",")))
	case "unshare-mount": // SOURCE TARGET TYPE DATA, in a new user namespace
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP); err != nil {
			return text("", err)
		}
		return text("ok", unix.Mount(f[0], f[1], f[2], 0, strings.Join(f[3:], ",")))
	case "remount":
		return text("ok", unix.Mount("", x, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	case "tty": // whether stdin is the pty at /dev/console
		return console()
	case "secret": // looks for the canary's text in every file in reach
		return secret()
	case "swap": // exchanges two names for ever
		for {
			if err := unix.Renameat2(unix.AT_FDCWD, f[0], unix.AT_FDCWD, f[1], unix.RENAME_EXCHANGE); err != nil {
				return err.Error()
			}
		}
	case "hunt": // for processes that enter the container
		hunt()
	case "hold":
		time.Sleep(time.Hour)
	case "exit":
		n, _ := strconv.Atoi(x)
		os.Exit(n)
	default:
		return "unknown verb"
	}
	return ""
}

func text(s string, err error) string {
	if err != nil {
		return "error: " + err.Error()
	}
	return s
}

func mknod(f []string) string {
	maj, _ := strconv.Atoi(f[1])
	min, _ := strconv.Atoi(f[2])
	mode := uint32(unix.S_IFCHR)
	if f[0] == "b" {
		mode = unix.S_IFBLK
	}
	name := "/tmp/node" + strings.Join(f, "-")
	if err := unix.Mknod(name, mode|0o600, int(unix.Mkdev(uint32(maj), uint32(min)))); err != nil {
		return "mknod: " + err.Error()
	}
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "open: " + err.Error()
	}
	unix.Close(fd)
	return "ok"
}

// descriptors lists what is open beyond stdio and the Go runtime's own.
func descriptors() string {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return text("", err)
	}
	var names []string
	for _, e := range d {
		l, err := os.Readlink("/proc/self/fd/" + e.Name())
		if n, _ := strconv.Atoi(e.Name()); err != nil || n < 3 || strings.HasPrefix(l, "anon_inode:[event") || strings.HasPrefix(l, "/proc/") || strings.Contains(l, "/cpu.cfs_") || strings.HasSuffix(l, "/cpu.max") {
			continue
		}
		names = append(names, e.Name()+"="+l)
	}
	return strings.Join(names, ",")
}

// console compares stdin with /dev/console: one terminal, on the container's devpts.
func console() string {
	var in, con unix.Stat_t
	var pts unix.Statfs_t
	err := unix.Fstat(0, &in)
	if err == nil {
		err = unix.Stat("/dev/console", &con)
	}
	if err == nil {
		err = unix.Statfs("/dev/console", &pts)
	}
	if err != nil {
		return text("", err)
	}
	if _, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ); err != nil {
		return "stdin is no terminal"
	}
	if in.Rdev != con.Rdev || in.Dev != con.Dev || pts.Type != unix.DEVPTS_SUPER_MAGIC {
		return fmt.Sprintf("stdin is %x on %x, /dev/console %x on %x", in.Rdev, in.Dev, con.Rdev, con.Dev)
	}
	return "ok"
}

func secret() string {
	found := ""
	_ = filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		var st unix.Statfs_t
		if path == "/sys" || path == "/bin" || d.IsDir() && (unix.Statfs(path, &st) != nil || st.Type == unix.PROC_SUPER_MAGIC) {
			return fs.SkipDir
		}
		// What the directory says may be of a file below a mount, or outdated.
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOCTTY, 0)
		if err != nil {
			return nil
		}
		file := os.NewFile(uintptr(fd), path)
		defer file.Close()
		if fi, err := file.Stat(); err == nil && fi.Mode().IsRegular() {
			if b, err := io.ReadAll(file); err == nil && bytes.Contains(b, []byte(canaryText)) {
				found += path + " "
			}
		}
		return nil
	})
	return strings.TrimSpace(found)
}
