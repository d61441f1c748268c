package crashpoint

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const variable = "BERTH_TEST_CRASH_PLAN"

// TestMain passes some points when it is the process that a test kills.
func TestMain(m *testing.M) {
	if os.Getenv(variable) == "" {
		os.Exit(m.Run())
	}
	Arm(variable)
	for _, step := range []string{"one", "two", "three"} {
		Here("op", step, "before")
		Here("op", step, "after")
	}
	Here("other")
}

// child runs the points above with a plan, and returns the names of those passed
// and whether the process was killed.
func child(t *testing.T, text string) (log []string, killed bool, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "plan")
	if text != "" {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), variable+"="+file)
	err := cmd.Run()
	if s := cmd.ProcessState.Sys().(syscall.WaitStatus); s.Signaled() {
		killed = s.Signal() == syscall.SIGKILL
	} else if err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(file + ".log")
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' }), killed, file
}

func TestAPlanKillsAtItsPoint(t *testing.T) {
	all, killed, _ := child(t, "0")
	if killed || len(all) != 7 || all[0] != "op: one: before" || all[6] != "other" {
		t.Fatalf("without a number: killed %v, passed %q", killed, all)
	}
	for n := 1; n <= len(all); n++ {
		log, killed, file := child(t, string(rune('0'+n)))
		if !killed || len(log) != n || log[n-1] != all[n-1] {
			t.Errorf("point %d: killed %v, passed %q", n, killed, log)
		}
		if _, err := os.Stat(file); !os.IsNotExist(err) {
			t.Errorf("point %d: the plan is still there: %v", n, err)
		}
	}
	if log, killed, _ := child(t, "8"); killed || len(log) != 7 {
		t.Errorf("a number beyond the last: killed %v, passed %q", killed, log)
	}
	if log, killed, _ := child(t, "2 after"); !killed || len(log) != 2 || log[1] != "op: two: after" {
		t.Errorf("with a text: killed %v, passed %q", killed, log)
	}
	if log, killed, _ := child(t, ""); killed || len(log) != 0 {
		t.Errorf("without a file: killed %v, passed %q", killed, log)
	}
}

// TestANewFileCountsAnew: one process can be given plan after plan.
func TestANewFileCountsAnew(t *testing.T) {
	p := &plan{file: filepath.Join(t.TempDir(), "plan")}
	for range 3 {
		p.pass([]string{"unarmed"})
		if err := os.WriteFile(p.file, []byte("0"), 0o600); err != nil {
			t.Fatal(err)
		}
		p.pass([]string{"a"})
		p.pass([]string{"b"})
		if p.passed != 2 {
			t.Errorf("passed %d", p.passed)
		}
		if err := os.Remove(p.file); err != nil {
			t.Fatal(err)
		}
	}
	if b, _ := os.ReadFile(p.file + ".log"); string(b) != strings.Repeat("a\nb\n", 3) {
		t.Errorf("log %q", b)
	}
}

func TestAnUnarmedPointCostsNothing(t *testing.T) {
	step := os.Args[0]
	if n := testing.AllocsPerRun(100, func() { Here("op", step, "before") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkUnarmed(b *testing.B) {
	for b.Loop() {
		Here("op", "step", "before")
	}
}
