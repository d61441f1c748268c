package kernel

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Waiting is what a thread of a process is doing.
type Waiting struct {
	Pid     int
	Command string // the name that the kernel knows it by, 15 bytes
	State   byte   // as in proc_pid_stat(5): R, S, D, T, t, Z, X
	In      string // the kernel function that it sleeps in; "" when the kernel does not tell
}

// maxThreads bounds how many threads of a process are looked at.
const maxThreads = 64

// LookAt says what a process is doing: its thread in uninterruptible sleep if it
// has one, else its first. It reads nothing that can block itself: cmdline and
// environ wait for the process's memory map, stack and syscall for its execve,
// and a process that hangs may hold either.
func LookAt(pid int) (Waiting, error) {
	first, err := lookAt("/proc/"+strconv.Itoa(pid), pid)
	if err != nil || first.State == 'D' {
		return first, err
	}
	tasks := "/proc/" + strconv.Itoa(pid) + "/task"
	d, err := os.Open(tasks)
	if err != nil {
		return first, nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(maxThreads)
	for _, n := range names {
		if w, err := lookAt(filepath.Join(tasks, n), pid); err == nil && (w.State == 'D' || first.State == 'Z' && w.State != 'Z') {
			first = w
			if w.State == 'D' {
				break
			}
		}
	}
	return first, nil
}

// Stuck returns a thread of a process that a signal may not wake: one in
// uninterruptible sleep, or that waits for a file system which lets it sleep so
// as soon as a signal comes.
func Stuck(pid int) (Waiting, bool) {
	tasks := "/proc/" + strconv.Itoa(pid) + "/task"
	d, err := os.Open(tasks)
	if err != nil {
		return Waiting{}, false
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	for _, n := range names {
		if w, err := lookAt(filepath.Join(tasks, n), pid); err == nil && (w.State == 'D' || w.FileSystem() != "") {
			return w, true
		}
	}
	return Waiting{}, false
}

func lookAt(dir string, pid int) (Waiting, error) {
	name, fields, err := readStat(dir)
	if err != nil {
		return Waiting{}, err
	}
	if len(fields) == 0 {
		return Waiting{}, fmt.Errorf("%s/stat: has no state", dir)
	}
	w := Waiting{Pid: pid, Command: name, State: fields[0][0]}
	if in, err := os.ReadFile(filepath.Join(dir, "wchan")); err == nil && string(in) != "0" {
		w.In = string(in)
	}
	return w, nil
}

var stateNames = map[byte]string{'R': "running", 'S': "sleeping", 'D': "in uninterruptible sleep", 'T': "stopped", 't': "stopped by a tracer", 'Z': "dead, and not reaped by its parent"}

func (w Waiting) String() string {
	state := stateNames[w.State]
	if state == "" {
		state = "in an unknown state"
	}
	s := fmt.Sprintf("process %d (%s) is %s (state %c)", w.Pid, strconv.QuoteToASCII(w.Command), state, w.State)
	if w.In != "" {
		s += " in " + w.In
	}
	return s
}

// waitsFor are the beginnings of the names of functions that wait for a file
// system whose server may never answer.
var waitsFor = []struct{ fs, function string }{
	{"fuse", "request_wait_answer"}, {"fuse", "fuse_"},
	{"nfs", "rpc_"}, {"nfs", "nfs"}, {"nfs", "__rpc_"},
	{"cifs", "cifs_"}, {"cifs", "wait_for_response"},
	{"9p", "p9_"}, {"ceph", "ceph_"},
}

// FileSystem is the kind of file system that the thread waits for, or "".
func (w Waiting) FileSystem() string {
	for _, f := range waitsFor {
		if strings.HasPrefix(w.In, f.function) {
			return f.fs
		}
	}
	return ""
}

// FSMount is a mount as a process sees it.
type FSMount struct{ Point, Type, Source string }

// MountsOf lists the mounts of a kind of file system ("fuse", "nfs", ...) that a
// process sees. It asks no file system anything.
func MountsOf(pid int, kind string) (out []FSMount) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/mountinfo")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 2 {
			continue
		}
		if r[0] == kind || strings.HasPrefix(r[0], kind+".") || kind == "fuse" && slices.Contains([]string{"fuseblk", "virtiofs"}, r[0]) || kind == "nfs" && r[0] == "nfs4" {
			out = append(out, FSMount{Point: l[4], Type: r[0], Source: r[1]})
		}
	}
	return out
}
