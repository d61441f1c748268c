package supervisor

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// program writes a shell script.
func program(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestUpgradeThatFails: the program is there when it is looked at and gone when it
// is to be started. The supervisor goes on, with the descriptors that it had.
func TestUpgradeThatFails(t *testing.T) {
	s, f := fakeServer(t), &fakeContainer{t: t}
	k := f.in(s)
	run(t, s, k)
	s.lanes.Warm()
	open := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	var limit, now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	runtime.GC() // what the test itself has left
	time.Sleep(10 * time.Millisecond)
	before := open()
	if err := s.upgrade(program(t, `rm "$0"`)); err == nil {
		t.Fatal("no error")
	}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil || now != limit {
		t.Errorf("the limit of descriptors is %v, was %v", now, limit)
	}
	// Whoever gets the numbers of what was to be left keeps them.
	var fds []int
	for range 64 {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	for range 3 {
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
	}
	for _, fd := range fds {
		if err := unix.Close(fd); err != nil {
			t.Errorf("descriptor %d: somebody else closed it: %v", fd, err)
		}
	}
	if after := open(); after != before {
		t.Errorf("%d descriptors, were %d", after, before)
	}
	if err := k.delete(s, false); err != nil {
		t.Error(err)
	}
}

// TestUpgradeToAProgramWithoutIt: one that cannot go on with what is left to it
// would end, and so would the containers.
func TestUpgradeToAProgramWithoutIt(t *testing.T) {
	s := fakeServer(t)
	if err := s.check(program(t, `test "$*" = --version`)); err == nil {
		t.Error("a program that does not know --resume is good enough")
	}
	if err := s.check(program(t, `case "$*" in *--version) ;; *) exit 1;; esac`)); err != nil {
		t.Error(err)
	}
}
