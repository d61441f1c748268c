package main

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// firstFile is the first descriptor after stdio.
const firstFile = 3

// givenFiles counts the descriptors after stdio that are open, without a gap.
// Asked before anything of ours is opened: later the numbers would be ours.
func givenFiles() int {
	for n := 0; ; n++ {
		if _, err := unix.FcntlInt(uintptr(firstFile+n), unix.F_GETFD, 0); err != nil {
			return n
		}
	}
}

// passedFiles collects the descriptors that the container is to have after
// stdio: the sockets of systemd's activation protocol, then n more. env names
// the sockets; the program is pid 1.
func (a *app) passedFiles(n int) (files []*os.File, env []string, err error) {
	listen := 0
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err == nil && (pid == os.Getpid() || inside() && pid == os.Getppid()) {
		listen, _ = strconv.Atoi(os.Getenv("LISTEN_FDS")) // 0 if it is no number
	}
	if listen > 0 {
		if files, err = a.preserved(firstFile, listen); err != nil {
			return nil, nil, fmt.Errorf("LISTEN_FDS: %w", err)
		}
		env = []string{"LISTEN_FDS=" + strconv.Itoa(listen), "LISTEN_PID=1"}
	}
	more, err := a.preserved(firstFile+len(files), n)
	return append(files, more...), env, err
}

// preserved collects n descriptors from base on.
func (a *app) preserved(base, n int) ([]*os.File, error) {
	if n < 0 {
		return nil, fmt.Errorf("--preserve-fds %d: want a number of descriptors", n)
	}
	if missing := firstFile + a.given; missing < base+n {
		return nil, fmt.Errorf("unable to stat preserved-fd %d (of %d): descriptor %d is not open", missing-base, n, missing)
	}
	var files []*os.File
	for fd := base; fd < base+n; fd++ {
		files = append(files, os.NewFile(uintptr(fd), "fd "+strconv.Itoa(fd)))
	}
	return files, nil
}
