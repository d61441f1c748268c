package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// readlink PATH
func readlink(args []string) int {
	s, err := os.Readlink(args[0])
	if err != nil {
		return complain(err)
	}
	fmt.Println(s)
	return 0
}

// xattr PATH NAME: the value of an extended attribute, raw.
func xattr(args []string) int {
	buf := make([]byte, 64<<10)
	n, err := syscall.Getxattr(args[0], args[1], buf)
	if err != nil {
		return complain(err)
	}
	os.Stdout.Write(buf[:n])
	return 0
}

// mount DIR: mounts a tmpfs on DIR, made if missing, with a file "mounted" in it.
func mountTmpfs(args []string) int {
	if err := os.MkdirAll(args[0], 0o755); err != nil {
		return complain(err)
	}
	if err := syscall.Mount("tmpfs", args[0], "tmpfs", 0, "size=1m"); err != nil {
		return complain(err)
	}
	if err := os.WriteFile(args[0]+"/mounted", nil, 0o644); err != nil {
		return complain(err)
	}
	return 0
}

// ps: pid and command line of every process in sight.
func ps([]string) int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return complain(err)
	}
	for _, d := range dirs {
		b, err := os.ReadFile(d + "/cmdline")
		if err == nil {
			fmt.Println(filepath.Base(d), strings.ReplaceAll(strings.TrimRight(string(b), "\x00"), "\x00", " "))
		}
	}
	return 0
}

// statfs PATH: the size of the filesystem in bytes.
func statfs(args []string) int {
	var s syscall.Statfs_t
	if err := syscall.Statfs(args[0], &s); err != nil {
		return complain(err)
	}
	fmt.Println(uint64(s.Bsize) * s.Blocks)
	return 0
}

// chmod PATH: to 0755.
func chmod(args []string) int {
	if err := os.Chmod(args[0], 0o755); err != nil {
		return complain(err)
	}
	return 0
}

// mknod-open MAJOR MINOR: makes a character device in /tmp and opens it.
func mknodOpen(args []string) int {
	dev := number(args, 0, 1)<<8 | number(args, 1, 3)
	path := fmt.Sprintf("/probe-%d", dev)
	if err := syscall.Mknod(path, syscall.S_IFCHR|0o666, dev); err != nil {
		return complain(fmt.Errorf("mknod: %w", err))
	}
	defer os.Remove(path)
	f, err := os.Open(path)
	if err != nil {
		return complain(err)
	}
	f.Close()
	return 0
}

// fds: the open descriptors of this process and what they are.
func fds([]string) int {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return complain(err)
	}
	for _, n := range names {
		if target, err := os.Readlink("/proc/self/fd/" + n.Name()); err == nil {
			fmt.Println(n.Name(), target)
		}
	}
	return 0
}

// log-samples: lines that are hard for a log writer.
func logSamples([]string) int {
	fmt.Print("line one\n\ncr\r\nnul\x00byte\n")
	fmt.Println(strings.Repeat("x", 40000))
	fmt.Print("no newline")
	fmt.Fprintln(os.Stderr, "to stderr")
	return 0
}

// count N MICROSECONDS: the numbers from 0 to N-1, one write each, with a pause between.
func count(args []string) int {
	pause := time.Duration(number(args, 1, 0)) * time.Microsecond
	for i := range number(args, 0, 10) {
		if _, err := fmt.Println(i); err != nil {
			return 1
		}
		time.Sleep(pause)
	}
	return 0
}

// exit-after MILLISECONDS CODE
func exitAfter(args []string) int {
	time.Sleep(time.Duration(number(args, 0, 0)) * time.Millisecond)
	return number(args, 1, 0)
}
