package external

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
	"github.com/berth-runtime/berth/test/ocitest"
)

// peers are the runtimes of the distribution that the suite runs on.
var peers = map[string]oci.Command{
	"runc": {Path: "/usr/sbin/runc"},
	"crun": {Path: "/usr/bin/crun", Args: []string{"--cgroup-manager=cgroupfs"}},
}

// needPeer skips when the runtime is not installed or cannot work on this host.
func needPeer(t *testing.T, name string) oci.Command {
	t.Helper()
	c := peers[name]
	if err := Check(c); err != nil {
		t.Skipf("%s is not installed: %v", name, err)
	}
	if name != "crun" {
		return c
	}
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if !h.V2() && h.Unified != "" {
		// Its words: "cgroups in hybrid mode not supported, drop all controllers from cgroupv2".
		b, err := os.ReadFile(filepath.Join(h.Unified, "cgroup.controllers"))
		var st unix.Statfs_t
		if serr := unix.Statfs("/sys/fs/cgroup/unified", &st); err == nil && serr == nil && st.Type == unix.CGROUP2_SUPER_MAGIC && strings.TrimSpace(string(b)) != "" {
			t.Skipf("crun takes no hybrid host whose cgroup v2 has controllers, and %s has: %s", h.Unified, strings.TrimSpace(string(b)))
		}
	}
	return c
}

func TestSuite(t *testing.T) {
	for name := range peers {
		t.Run(name, func(t *testing.T) {
			c := needPeer(t, name)
			open := func(t *testing.T) oci.Runtime {
				dir := t.TempDir()
				r, err := New(Config{Handler: name, Command: c, Dir: dir})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { nothingIn(t, dir, name) })
				return r
			}
			ocitest.Run(t, open)
			ocitest.RunExtraFiles(t, open)
			t.Run("adopted", func(t *testing.T) { ocitest.RunAdopted(t, open) })
		})
	}
}

// nothingIn checks the runtime's own state and the bundles.
func nothingIn(t *testing.T, dir, name string) {
	t.Helper()
	for _, d := range []string{"state", "bundles"} {
		entries, err := os.ReadDir(filepath.Join(dir, name, d))
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			t.Errorf("%s: left: %s", d, e.Name())
		}
	}
}
