package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unsafe"
)

// id: "uid=U gid=G groups=A,B" of the process, groups sorted.
func identity([]string) int {
	groups, err := os.Getgroups()
	if err != nil {
		return complain(err)
	}
	slices.Sort(groups)
	fmt.Printf("uid=%d gid=%d groups=%s\n", os.Getuid(), os.Getgid(), strings.Trim(strings.ReplaceAll(fmt.Sprint(groups), " ", ","), "[]"))
	return 0
}

// ls [DIR...]: one name a line, directories with a slash, sorted.
func ls(args []string) int {
	if len(args) == 0 {
		args = []string{"."}
	}
	for _, dir := range args {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return complain(err)
		}
		for _, e := range entries {
			name := e.Name()
			if e.IsDir() {
				name += "/"
			}
			fmt.Println(name)
		}
	}
	return 0
}

// stat FILE...: "NAME MODE UID:GID SIZE nlink=N ino=I dev=MAJ:MIN [-> TARGET]",
// links not followed; MODE is the type letter of ls(1) and octal permissions, and
// dev is the number of a device node, 0:0 for the rest.
func stat(args []string) int {
	for _, name := range args {
		fi, err := os.Lstat(name)
		if err != nil {
			return complain(err)
		}
		st := fi.Sys().(*syscall.Stat_t)
		target := ""
		if fi.Mode()&os.ModeSymlink != 0 {
			if t, err := os.Readlink(name); err == nil {
				target = " -> " + t
			}
		}
		dev := uint64(st.Rdev)
		major, minor := dev>>8&0xfff|dev>>32&^0xfff, dev&0xff|dev>>12&^0xff
		fmt.Printf("%s %c%04o %d:%d %d nlink=%d ino=%d dev=%d:%d%s\n", name, "?pc?d?b?-?l?s???"[st.Mode>>12&15], st.Mode&0o7777,
			st.Uid, st.Gid, st.Size, st.Nlink, st.Ino, major, uint32(minor), target)
	}
	return 0
}

// write FILE TEXT...: replaces FILE, making the folders on the way.
func write(args []string) int {
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "write FILE TEXT...")
		return 2
	}
	if err := os.MkdirAll(filepath.Dir(args[0]), 0o755); err != nil {
		return complain(err)
	}
	if err := os.WriteFile(args[0], []byte(strings.Join(args[1:], " ")+"\n"), 0o644); err != nil {
		return complain(err)
	}
	return 0
}

// tty: says for each of stdin, stdout and stderr whether it is a terminal, and
// the terminal's size ("stdin=1 stdout=1 stderr=1 rows=24 cols=80").
func tty(args []string) int {
	if len(args) > 0 && args[0] == "wait" {
		var line [256]byte
		if _, err := os.Stdin.Read(line[:]); err != nil {
			return complain(err)
		}
	}
	var size struct{ rows, cols, x, y uint16 }
	for fd, name := range []string{"stdin", "stdout", "stderr"} {
		is := 0
		if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size))); e == 0 {
			is = 1
		}
		fmt.Printf("%s=%d ", name, is)
	}
	fmt.Printf("rows=%d cols=%d\n", size.rows, size.cols)
	return 0
}
