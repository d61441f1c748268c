package main

import (
	"bufio"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// maxPasswd bounds what is read of a container's /etc/passwd, in bytes.
const maxPasswd = 1 << 20

// setEnv gives the process its environment, as runc does: of two variables of
// one name the later, and where HOME has no value the one in /etc/passwd below
// root, or "/".
func setEnv(p *specs.Process, root string) {
	var out []string
	seen := map[string]bool{"": true}
	for _, e := range slices.Backward(p.Env) {
		name, _, ok := strings.Cut(e, "=")
		if seen[name] || !ok || e == "HOME=" {
			seen[name] = true
			continue
		}
		seen[name] = true
		out = append(out, e)
	}
	slices.Reverse(out)
	if !slices.ContainsFunc(out, func(e string) bool { return strings.HasPrefix(e, "HOME=") }) {
		out = append(out, "HOME="+home(root, p.User.UID))
	}
	p.Env = out
}

func home(root string, uid uint32) string {
	const none = "/"
	dir, err := os.OpenFile(root, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return none
	}
	defer dir.Close()
	// An image's file: it leads nowhere outside, and is no FIFO that nobody writes.
	f, err := kernel.OpenInRoot(dir, "/etc/passwd", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return none
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return none
	}
	want := strconv.FormatUint(uint64(uid), 10)
	for s := bufio.NewScanner(io.LimitReader(f, maxPasswd)); s.Scan(); {
		if e := strings.Split(s.Text(), ":"); len(e) >= 7 && e[2] == want && e[5] != "" && !strings.ContainsRune(e[5], 0) {
			return e[5]
		}
	}
	return none
}
