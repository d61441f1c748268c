package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

// terminated is closed at the first SIGTERM or SIGINT.
func terminated() <-chan struct{} {
	sig, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(sig, syscall.SIGTERM, syscall.SIGINT)
	go func() { <-sig; close(done) }()
	return done
}

// signal-ignore: prints "ready", ignores SIGTERM, SIGINT and SIGHUP, and stays
// until it is killed.
func signalIgnore([]string) int {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	fmt.Println("ready")
	for {
		time.Sleep(time.Hour)
	}
}

// signal-report: prints "ready", then the number of the first signal that comes
// and exits with status 100 + number.
func signalReport([]string) int {
	sig := make(chan os.Signal, 8)
	// SIGURG is how the Go runtime interrupts its own threads.
	for s := syscall.Signal(1); s < 65; s++ {
		if s != syscall.SIGURG && s != syscall.SIGCHLD && s != syscall.SIGPIPE {
			signal.Notify(sig, s)
		}
	}
	fmt.Println("ready")
	s := (<-sig).(syscall.Signal)
	fmt.Println("signal", int(s))
	return 100 + int(s)
}

// alloc MB [SECONDS]: touches MB mebibytes, prints "allocated", and keeps them
// for SECONDS (default: for ever).
func alloc(args []string) int {
	blocks := make([][]byte, number(args, 0, 1))
	for i := range blocks {
		blocks[i] = make([]byte, 1<<20)
		for j := 0; j < len(blocks[i]); j += 4096 {
			blocks[i][j] = 1
		}
	}
	fmt.Println("allocated")
	keep := number(args, 1, 0)
	if keep == 0 {
		<-terminated()
	} else {
		time.Sleep(time.Duration(keep) * time.Second)
	}
	return int(blocks[0][0]) - 1
}

// fork N: starts N sleeping children and stays with them. It prints how many it
// could start, and exits 1 when that is fewer than asked.
func fork(args []string) int {
	n := number(args, 0, 1)
	for i := range n {
		c := exec.Command("/proc/self/exe", "sleep")
		if err := c.Start(); err != nil {
			fmt.Println("forked", i)
			return complain(err)
		}
	}
	fmt.Println("forked", n)
	<-terminated()
	return 0
}

// fork-endlessly: starts itself again and again, and so does each that it starts,
// as long as the pids limit lets them. It ends only by SIGKILL.
func forkEndlessly([]string) int {
	signal.Ignore(syscall.SIGTERM)
	fmt.Println("forking")
	for {
		_ = exec.Command("/proc/self/exe", "fork-endlessly").Start() // not reaped either
		time.Sleep(time.Millisecond)
	}
}

// orphan [SECONDS]: leaves a child behind that holds stdout and stderr open for
// SECONDS (default 60), and exits 0 at once.
func orphan(args []string) int {
	c := exec.Command("/proc/self/exe", "sleep", fmt.Sprint(number(args, 0, 60)))
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	if err := c.Start(); err != nil {
		return complain(err)
	}
	fmt.Println("orphan", c.Process.Pid)
	return 0
}

// spin SECONDS: one busy core.
func spin(args []string) int {
	end := time.Now().Add(time.Duration(number(args, 0, 1)) * time.Second)
	for time.Now().Before(end) {
	}
	return 0
}
