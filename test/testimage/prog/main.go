// Command prog is the program inside Berth's test images: one static binary
// without a shell that serves, sleeps, prints, exits and misbehaves as told, so
// that a test can see from the outside what a container was given.
//
// The command is the base name that it was started under, when that is one
// (/bin/echo is a hard link), and else the first argument.
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
)

// command does its work and returns the exit status.
type command func(args []string) int

var commands map[string]command

func init() {
	commands = map[string]command{
		"serve": serve, "get": get, "resolve": resolve, "listen": listen,
		"sleep": sleep, "print": printLines, "exit": exit, "true": yes, "false": no, "both": both,
		"echo": echo, "cat": cat, "env": env, "id": identity, "ls": ls, "stat": stat, "write": write,
		"pwd": pwd, "hostname": hostname, "tty": tty,
		"signal-ignore": signalIgnore, "signal-report": signalReport, "alloc": alloc, "fork": fork, "fork-endlessly": forkEndlessly, "orphan": orphan, "spin": spin,
		"readlink": readlink, "xattr": xattr, "mount": mountTmpfs, "ps": ps, "statfs": statfs, "chmod": chmod, "mknod-open": mknodOpen, "fds": fds,
		"log-samples": logSamples, "count": count, "exit-after": exitAfter,
		"commands": list,
	}
}

func main() {
	if c, ok := commands[filepath.Base(os.Args[0])]; ok {
		os.Exit(c(os.Args[1:]))
	}
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "no command given; `commands` lists them")
		os.Exit(2)
	}
	c, ok := commands[filepath.Base(os.Args[1])]
	if !ok {
		fmt.Fprintf(os.Stderr, "%s: no such command; `commands` lists them\n", os.Args[1])
		os.Exit(2)
	}
	os.Exit(c(os.Args[2:]))
}

// complain reports err on stderr, in the command's exit status 1.
func complain(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// number is args[i] as an integer, or def when it is absent or none.
func number(args []string, i, def int) int {
	if i >= len(args) {
		return def
	}
	n, err := strconv.Atoi(args[i])
	if err != nil {
		return def
	}
	return n
}

func list([]string) int {
	names := make([]string, 0, len(commands))
	for n := range commands {
		names = append(names, n)
	}
	sort.Strings(names)
	fmt.Println(strings.Join(names, "\n"))
	return 0
}

func yes([]string) int { return 0 }

func no([]string) int { return 1 }

// exit CODE
func exit(args []string) int { return number(args, 0, 0) }

// sleep [SECONDS]: for ever without an argument. It ends with status 0 on
// SIGTERM, as a well-behaved first process does.
func sleep(args []string) int {
	stop := terminated()
	if len(args) == 0 || args[0] == "infinity" {
		<-stop
		return 0
	}
	d, err := strconv.ParseFloat(args[0], 64)
	if err != nil {
		return complain(err)
	}
	select {
	case <-stop:
	case <-time.After(time.Duration(d * float64(time.Second))):
	}
	return 0
}

// print N SIZE: N lines of SIZE bytes, line feed included, as fast as the pipe
// takes them. N of 0 means for ever.
func printLines(args []string) int {
	n, size := number(args, 0, 1), number(args, 1, 100)
	if size < 1 {
		size = 1
	}
	line := []byte(strings.Repeat("x", size-1) + "\n")
	per := max(1, 64<<10/size)
	block := []byte(strings.Repeat(string(line), per))
	for n == 0 || n >= per {
		if _, err := os.Stdout.Write(block); err != nil {
			return complain(err)
		}
		if n > 0 {
			if n -= per; n == 0 {
				return 0
			}
		}
	}
	if _, err := os.Stdout.Write(block[:n*size]); err != nil {
		return complain(err)
	}
	return 0
}

// both OUT ERR: one line to stdout, one to stderr.
func both(args []string) int {
	args = append(args, "out", "err")
	fmt.Fprintln(os.Stdout, args[0])
	fmt.Fprintln(os.Stderr, args[1])
	return 0
}

func echo(args []string) int {
	fmt.Println(strings.Join(args, " "))
	return 0
}

// cat [FILE...]: files, or stdin.
func cat(args []string) int {
	if len(args) == 0 {
		if _, err := io.Copy(os.Stdout, os.Stdin); err != nil {
			return complain(err)
		}
		return 0
	}
	for _, name := range args {
		f, err := os.Open(name)
		if err != nil {
			return complain(err)
		}
		_, err = io.Copy(os.Stdout, f)
		f.Close()
		if err != nil {
			return complain(err)
		}
	}
	return 0
}

// env [NAME...]: all variables in their order, or the values of those named.
func env(args []string) int {
	if len(args) == 0 {
		for _, e := range os.Environ() {
			fmt.Println(e)
		}
		return 0
	}
	code := 0
	for _, n := range args {
		v, ok := os.LookupEnv(n)
		if !ok {
			code = 1
			continue
		}
		fmt.Println(v)
	}
	return code
}

func pwd([]string) int {
	d, err := os.Getwd()
	if err != nil {
		return complain(err)
	}
	fmt.Println(d)
	return 0
}

func hostname([]string) int {
	h, err := os.Hostname()
	if err != nil {
		return complain(err)
	}
	fmt.Println(h)
	return 0
}
