// Package ocitest is the test suite of oci.Runtime: what the supervisor and the
// engine rely on, run by the tests of every runtime. A test binary that imports
// it is also the program of the suite's containers.
package ocitest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/test/pace"
)

// test is one test of a suite.
type test struct {
	name string
	run  func(*suite, *testing.T)
}

// Run runs the suite on the runtime that open makes; open registers its own
// cleanup. It needs root, and makes the process a child subreaper.
func Run(t *testing.T, open func(t *testing.T) oci.Runtime) {
	runAll(t, open, []test{
		{"Start", (*suite).testStart},
		{"Stdio", (*suite).testStdio},
		{"User", (*suite).testUser},
		{"Namespaces", (*suite).testNamespaces},
		{"PIDNamespace", (*suite).testPIDNamespace},
		{"Mounts", (*suite).testMounts},
		{"Propagation", (*suite).testPropagation},
		{"Rootfs", (*suite).testRootfs},
		{"Terminal", (*suite).testTerminal},
		{"Exec", (*suite).testExec},
		{"ExecTerminal", (*suite).testExecTerminal},
		{"StartErrors", (*suite).testStartErrors},
		{"CreateErrors", (*suite).testCreateErrors},
		{"Signals", (*suite).testSignals},
		{"KillAll", (*suite).testKillAll},
		{"Pause", (*suite).testPause},
		{"Update", (*suite).testUpdate},
		{"OOMKills", (*suite).testOOMKills},
		{"DeleteUnstarted", (*suite).testDeleteUnstarted},
	})
}

// RunExtraFiles is the part of the suite about oci.Stdio.Extra.
func RunExtraFiles(t *testing.T, open func(t *testing.T) oci.Runtime) {
	runAll(t, open, []test{{"ExtraFiles", (*suite).testExtraFiles}})
}

func runAll(t *testing.T, open func(t *testing.T) oci.Runtime, tests []test) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	for _, x := range tests {
		t.Run(x.name, func(t *testing.T) {
			before := leftovers(t)
			t.Cleanup(func() {
				nothingLeft(t, before)
				clear(others)
			})
			x.run(&suite{rt: open(t)}, t)
		})
	}
}

// nothingLeft fails the test when there is more now than before. The kernel ends
// mounts and cgroups a moment after their last user.
func nothingLeft(t *testing.T, before []string) {
	t.Helper()
	for _, top := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		dirs, _ := filepath.Glob(top + cgroupParent)
		for _, d := range dirs {
			_ = os.Remove(d) // when it is empty
		}
	}
	for deadline := time.Now().Add(pace.Wait(2 * time.Second)); ; time.Sleep(10 * time.Millisecond) {
		_, _ = unix.Wait4(-1, nil, unix.WNOHANG, nil) // a runtime's own that was left to us
		now := leftovers(t)
		if slices.Equal(before, now) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left behind: before\n%s\nafter\n%s", strings.Join(before, "\n"), strings.Join(now, "\n"))
			return
		}
	}
}

// readCgroup reads a control file of the suite's container: name in cgroup v2, or
// name1 of a controller in v1.
func readCgroup(t *testing.T, r *request, name, controller, name1 string) string {
	t.Helper()
	path := filepath.Join("/sys/fs/cgroup", controller, r.Spec.Linux.CgroupsPath, name1)
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		path = filepath.Join("/sys/fs/cgroup", r.Spec.Linux.CgroupsPath, name)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func nsOf(t *testing.T, pid int, kind string) *os.File {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
