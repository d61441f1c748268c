// Package crashpoint lets a test kill a Berth process at a chosen place. The
// places are the boundaries between two acts that outlive the process: a record
// written, a namespace handed over, a file renamed. A process that dies at any of
// them must cost nothing; test/crash kills it at each.
//
// In production no point is armed and Here is one load of a variable.
//
// A test arms a process by naming a plan file in its environment, in a variable
// that each program has for itself (a daemon does not arm the supervisor that it
// starts). While the file exists, points are counted from 1 and their names are
// added to <plan>.log, a line each. The file holds the number of the point at
// which the process kills itself, 0 for none, and may hold, after a space, a text
// that a name must contain to be counted. The process removes the file before it
// dies, so that the next process lives; a file written anew counts anew. A test
// that can remove the file itself knows that the process will not die.
package crashpoint

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Variables that name the plan files.
const (
	Daemon     = "BERTHD_CRASH_PLAN"
	Supervisor = "BERTH_SUPERVISOR_CRASH_PLAN"
)

// armed is set before the program starts its first goroutine, or never.
var armed *plan

// Arm arms this process when the environment variable names a plan file.
func Arm(variable string) {
	if file := os.Getenv(variable); file != "" {
		armed = &plan{file: file}
	}
}

// Here is a place where a process may die. The parts are its name: what is being
// done, a step of it, and where in the step.
func Here(parts ...string) {
	if armed != nil {
		armed.pass(parts)
	}
}

type plan struct {
	file string

	mu     sync.Mutex
	inode  uint64    // of the file that is followed
	at     time.Time // when it was written
	kill   int       // the point to die at
	only   string
	passed int
}

func (p *plan) pass(parts []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.follow() {
		return
	}
	name := strings.Join(parts, ": ")
	if !strings.Contains(name, p.only) {
		return
	}
	p.passed++
	p.log(name)
	// Who removes the file decides: the test that gets it lets the process live.
	if p.passed == p.kill && os.Remove(p.file) == nil {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // the signal reaches every thread before it is back in the program
	}
}

// follow reads the file when it is new; false means that there is none.
func (p *plan) follow() bool {
	var st unix.Stat_t
	if err := unix.Stat(p.file, &st); err != nil {
		p.inode = 0
		return false
	}
	at := time.Unix(st.Mtim.Unix())
	if st.Ino == p.inode && at.Equal(p.at) {
		return true
	}
	text, err := os.ReadFile(p.file)
	if err != nil {
		return false
	}
	number, only, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	kill, err := strconv.Atoi(number)
	if err != nil {
		return false
	}
	p.inode, p.at, p.kill, p.only, p.passed = st.Ino, at, kill, only, 0
	return true
}

func (p *plan) log(name string) {
	f, err := os.OpenFile(p.file+".log", os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return
	}
	_, _ = f.WriteString(name + "\n")
	_ = f.Close()
}
