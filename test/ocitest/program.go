package ocitest

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// programName is the name under which the test binary is in the containers.
const programName = "ocitest"

// init makes any test binary that runs the suite the program of its containers.
func init() {
	if filepath.Base(os.Args[0]) == programName {
		program(os.Args[1:])
		os.Exit(0)
	}
}

// program does one thing after the other: "verb:argument".
func program(todo []string) {
	for _, x := range todo {
		verb, arg, _ := strings.Cut(x, ":")
		out, err := act(verb, arg)
		if err != nil {
			out = "error: " + err.Error()
		}
		if verb != "say" && verb != "cat" {
			out = x + " " + out
		}
		fmt.Println(strings.TrimRight(out, "\n"))
	}
}

func act(verb, arg string) (string, error) {
	switch verb {
	case "say":
		return arg, nil
	case "err":
		_, err := fmt.Fprintln(os.Stderr, arg)
		return "", err
	case "exit":
		n, err := strconv.Atoi(arg)
		if err == nil {
			os.Exit(n)
		}
		return "", err
	case "sleep":
		time.Sleep(time.Minute)
		return "", nil
	case "cat":
		b, err := io.ReadAll(os.Stdin)
		return string(b), err
	case "line":
		var s string
		_, err := fmt.Scanln(&s)
		return s, err
	case "term": // says ready, and ends with 7 at the signal
		c := make(chan os.Signal, 1)
		signal.Notify(c, unix.SIGTERM)
		fmt.Println("ready")
		<-c
		os.Exit(7)
	case "child": // one that outlives us in a session of its own
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		c := exec.Command(self, "sleep:")
		c.Args[0] = programName
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return "", c.Start()
	case "eat": // MiB
		n, err := strconv.Atoi(arg)
		if err != nil {
			return "", err
		}
		all := make([]byte, n<<20)
		for i := 0; i < len(all); i += 4096 {
			all[i] = 1
		}
		return strconv.Itoa(len(all)), nil
	case "fd":
		n, err := strconv.Atoi(arg)
		if err != nil {
			return "", err
		}
		b, err := io.ReadAll(os.NewFile(uintptr(n), "extra"))
		return string(b), err
	case "mount":
		return "ok", unix.Mount("tmpfs", arg, "tmpfs", 0, "size=64k")
	}
	return look(verb, arg)
}

// look is what only reads and writes.
func look(verb, arg string) (string, error) {
	switch verb {
	case "env":
		return os.Getenv(arg), nil
	case "id":
		g, err := os.Getgroups()
		return fmt.Sprint(os.Getuid(), " ", os.Getgid(), " ", g), err
	case "cwd":
		return os.Getwd()
	case "pid":
		return strconv.Itoa(os.Getpid()), nil
	case "host":
		return os.Hostname()
	case "link":
		return os.Readlink(arg)
	case "read":
		b, err := os.ReadFile(arg)
		return strings.ReplaceAll(string(b), "\n", "|"), err
	case "write":
		return "ok", os.WriteFile(arg, []byte("written"), 0o600)
	case "open": // for writing
		f, err := os.OpenFile(arg, os.O_WRONLY, 0)
		if err != nil {
			return "", err
		}
		return "ok", f.Close()
	case "stat":
		st, err := os.Stat(arg)
		if err != nil {
			return "", err
		}
		return st.Mode().String(), nil
	case "status":
		b, err := os.ReadFile("/proc/self/status")
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, arg+":"); ok {
				return strings.TrimSpace(v), err
			}
		}
		return "", err
	case "tty":
		w, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%dx%d", w.Col, w.Row), nil
	}
	return "", fmt.Errorf("unknown verb %q", verb)
}
