// Package leak tells what Berth or a test left on the machine: mounts, network
// namespaces, links, cgroups, processes and nftables tables that were not there
// before.
package leak

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/google/nftables"
)

// Snapshot is the set of things present at one moment, each as "kind: name".
type Snapshot map[string]bool

// Take reads the current state of the machine, as seen from the calling
// process's namespaces. Kernel threads and processes whose program is not
// Berth's are left out: only what carries Berth's name can be Berth's leak.
func Take() (Snapshot, error) {
	s := Snapshot{}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 4 {
			s["mount: "+f[4]] = true
		}
	}
	for _, dir := range []string{"/run/netns", "/var/run/netns"} {
		names, _ := os.ReadDir(dir)
		for _, n := range names {
			s["netns: "+n.Name()] = true
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		s["link: "+l.Name] = true
	}
	if err := cgroups(s); err != nil {
		return nil, err
	}
	if err := processes(s); err != nil {
		return nil, err
	}
	return s, tables(s)
}

func cgroups(s Snapshot) error {
	return filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil { // a cgroup that goes while we walk is not there: right
			return nil
		}
		if d.IsDir() {
			s["cgroup: "+path] = true
		}
		return nil
	})
}

func processes(s Snapshot) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, d := range dirs {
		exe, err := os.Readlink(d + "/exe")
		if err != nil {
			continue
		}
		base := filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
		if strings.HasPrefix(base, "berth") || strings.HasPrefix(exe, "/memfd:") {
			s["process: "+filepath.Base(d)+" "+base] = true
		}
	}
	return nil
}

func tables(s Snapshot) error {
	c, err := nftables.New()
	if err != nil {
		return nil // no nftables in this kernel: no tables either
	}
	ts, err := c.ListTables()
	if err != nil {
		return nil // as above
	}
	for _, t := range ts {
		s[fmt.Sprintf("nft table: %d/%s", t.Family, t.Name)] = true
	}
	return nil
}

// Since returns what is there now and was not in before, sorted. The kernel
// ends namespaces and links asynchronously, so it looks again until nothing is
// left or wait has passed.
func (before Snapshot) Since(wait time.Duration) ([]string, error) {
	deadline := time.Now().Add(wait)
	for {
		now, err := Take()
		if err != nil {
			return nil, err
		}
		var left []string
		for k := range now {
			if !before[k] {
				left = append(left, k)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			sort.Strings(left)
			return left, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}
