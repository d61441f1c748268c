package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func allowDevice(allow bool, kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
	d := specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Access: access}
	if major >= 0 {
		d.Major = &major
	}
	if minor >= 0 {
		d.Minor = &minor
	}
	return d
}

func setOf(t *testing.T, in ...specs.LinuxDeviceCgroup) (deviceSet, error) {
	t.Helper()
	rs, err := rules(in)
	if err != nil {
		t.Fatal(err)
	}
	return deviceSetOf(rs)
}

func TestDeviceSet(t *testing.T) {
	s, err := setOf(t, allowDevice(true, "c", 10, -1, "rw"), allowDevice(false, "c", 1, -1, "m"), allowDevice(false, "c", 5, 2, "rwm"), allowDevice(false, "b", -1, -1, "rwm"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range s.writes() {
		got = append(got, fmt.Sprint(w.allow, " ", w.value))
	}
	want := []string{"false a", "true c 1:3 rw", "true c 1:5 rw", "true c 1:7 rw", "true c 1:8 rw", "true c 1:9 rw", "true c 5:0 rwm", "true c 10:* rw", "true c 136:* rwm"}
	if !slices.Equal(got, want) {
		t.Errorf("writes %q\nwant %q", got, want)
	}
	// What the kernel would ignore, and so leave open, is refused.
	for name, in := range map[string][]specs.LinuxDeviceCgroup{
		"minor of a major": {allowDevice(true, "c", 10, -1, "rw"), allowDevice(false, "c", 10, 200, "w")},
		"major of all":     {allowDevice(true, "b", -1, -1, "r"), allowDevice(false, "b", 8, -1, "r")},
		"allow in a deny":  {allowDevice(true, "a", -1, -1, "rwm"), allowDevice(false, "b", 8, -1, "rwm"), allowDevice(true, "b", 8, 0, "r")},
	} {
		if _, err := setOf(t, in...); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Bits that nothing denies may overlap.
	if _, err := setOf(t, allowDevice(true, "c", 10, -1, "r"), allowDevice(false, "c", 10, 200, "w")); err != nil {
		t.Error(err)
	}
	list, all, err := AllowedDevices([]specs.LinuxDeviceCgroup{allowDevice(false, "a", -1, -1, "rwm"), allowDevice(true, "c", 10, 229, "rw")})
	if err != nil || all || len(list) != 9 || list[7] != (AllowedDevice{'c', 10, 229, "rw"}) {
		t.Errorf("%+v %v %v", list, all, err)
	}
	if _, all, err = AllowedDevices([]specs.LinuxDeviceCgroup{allowDevice(true, "a", -1, -1, "rwm")}); err != nil || !all {
		t.Errorf("all: %v %v", all, err)
	}
}

// TestSetAgreesWithProgram: v1 and v2 give every access the same answer.
func TestSetAgreesWithProgram(t *testing.T) {
	pick := []specs.LinuxDeviceCgroup{
		allowDevice(false, "a", -1, -1, "rwm"), allowDevice(true, "a", -1, -1, "rwm"), allowDevice(true, "c", 10, -1, "rw"), allowDevice(true, "c", 10, 200, "m"),
		allowDevice(false, "c", -1, -1, "m"), allowDevice(false, "c", 1, 3, "w"), allowDevice(true, "b", -1, -1, "r"), allowDevice(false, "b", 8, 0, "rwm"), allowDevice(true, "c", 1, 3, "rwm"),
	}
	held, refused := 0, 0
	for n := range len(pick) * len(pick) * len(pick) {
		in := []specs.LinuxDeviceCgroup{pick[n%len(pick)], pick[n/len(pick)%len(pick)], pick[n/len(pick)/len(pick)]}
		rs, err := rules(in)
		if err != nil {
			t.Fatal(err)
		}
		s, err := deviceSetOf(rs)
		if err != nil {
			refused++
			continue
		}
		held++
		p := deviceProgram(rs)
		for _, kind := range []byte{'b', 'c'} {
			for _, dev := range [][2]int64{{1, 3}, {8, 0}, {8, 1}, {10, 200}, {10, 201}, {136, 7}} {
				for access := int32(1); access < 8; access++ {
					bpfKind := uint32(unix.BPF_DEVCG_DEV_BLOCK)
					if kind == 'c' {
						bpfKind = unix.BPF_DEVCG_DEV_CHAR
					}
					v2 := runDevice(t, p, bpfKind, uint32(access), uint32(dev[0]), uint32(dev[1]))
					if v1 := s.permits(deviceKey{kind, dev[0], dev[1]}, access); v1 && !v2 {
						t.Fatalf("%+v: %c %v access %d: v1 %v, v2 %v", in, kind, dev, access, v1, v2)
					}
				}
			}
		}
	}
	if held < 100 || refused == 0 {
		t.Errorf("%d held, %d refused", held, refused)
	}
}

// permits is the kernel's check of a v1 devices cgroup.
func (s deviceSet) permits(k deviceKey, access int32) bool {
	for e, bits := range s.except {
		if !e.covers(k) {
			continue
		}
		if s.allow && bits&access != 0 {
			return false
		}
		if !s.allow && bits&access == access {
			return true
		}
	}
	return s.allow
}

func TestParseDeviceSet(t *testing.T) {
	s, err := parseDeviceSet("c 1:3 rwm\nb 8:* r\nc *:* m\n")
	if err != nil || s.allow || len(s.except) != 3 || s.except[deviceKey{'b', 8, -1}] != unix.BPF_DEVCG_ACC_READ || s.except[deviceKey{'c', -1, -1}] != unix.BPF_DEVCG_ACC_MKNOD {
		t.Errorf("%+v %v", s, err)
	}
	if s, err := parseDeviceSet("a *:* rwm"); err != nil || !s.allow {
		t.Errorf("%+v %v", s, err)
	}
	for _, bad := range []string{"x 1:3 r", "c 1 r", "c 1:x r", "c 1:3"} {
		if _, err := parseDeviceSet(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// TestReplaceDevices changes the rules while a process keeps opening a device
// that is allowed before and after, and one that never is.
func TestReplaceDevices(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		base := []specs.LinuxDeviceCgroup{allowDevice(false, "a", -1, -1, "rwm")}
		with := append(slices.Clone(base), allowDevice(true, "c", 1, 11, "r")) // kmsg
		c := create(t, h, &specs.LinuxResources{Devices: base})
		dir := t.TempDir()
		never := filepath.Join(dir, "never")
		if err := unix.Mknod(never, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 1))); err != nil {
			t.Fatal(err)
		}
		denied, opened, tries, stop := dir+"/denied", dir+"/opened", dir+"/tries", dir+"/stop"
		cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf(
			`while [ ! -e %s ]; do : </dev/null || echo >>%s; (: <%s) 2>/dev/null && echo >>%s; echo >>%s; done`, stop, denied, never, opened, tries))
		start(t, c, cmd)
		count := func(f string) int {
			b, _ := os.ReadFile(f)
			return strings.Count(string(b), "\n")
		}
		for i := 0; count(tries) < 30 || i < 20; i++ {
			r := with
			if i%2 == 1 {
				r = base
			}
			if _, err := c.Update(&specs.LinuxResources{Devices: r}); err != nil {
				t.Fatal(err)
			}
		}
		if h.V2() {
			cg, err := open(c.dirs[0].path, unix.O_DIRECTORY|unix.O_RDONLY)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(cg)
			own, err := ownFilters(cg)
			for _, f := range own {
				unix.Close(f)
			}
			if err != nil || len(own) != 1 {
				t.Errorf("%d filters, want 1: %v", len(own), err)
			}
		}
		// Allow all and back: the default changes.
		for _, r := range [][]specs.LinuxDeviceCgroup{
			{allowDevice(true, "a", -1, -1, "rwm"), allowDevice(false, "c", 1, 1, "rwm")}, with, base,
		} {
			if _, err := c.Update(&specs.LinuxResources{Devices: r}); err != nil {
				t.Fatal(err)
			}
		}
		if frozen, err := c.Frozen(); err != nil || frozen {
			t.Errorf("left frozen: %v %v", frozen, err)
		}
		if err := os.WriteFile(stop, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		if n := count(denied); n > 0 {
			t.Errorf("/dev/null was denied %d times of %d", n, count(tries))
		}
		if n := count(opened); n > 0 {
			t.Errorf("a denied device was opened %d times of %d", n, count(tries))
		}
	})
}

// TestReplaceFailsKeeps: the rules before stay when the new ones are refused.
func TestReplaceFailsKeeps(t *testing.T) {
	h := hosts(t)["v1"]
	if h == nil {
		t.Skip("no cgroup v1 devices controller")
	}
	c := create(t, h, &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{allowDevice(true, "c", 1, 11, "r")}})
	child := &Cgroup{host: h, path: c.path + "/child"}
	for _, d := range c.dirs {
		if d.Has("devices") {
			child.dirs = append(child.dirs, dir{d.Controller, d.rel + "/child", d.path + "/child"})
		}
	}
	if err := os.Mkdir(child.dirs[0].path, 0o755); err != nil {
		t.Fatal(err)
	}
	before := read(t, child, "devices", "devices.list")
	// The parent does not allow 10:229; the first of the two writes is taken back.
	_, err := child.Update(&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{allowDevice(true, "c", 1, 11, "r"), allowDevice(true, "c", 10, 229, "rw")}})
	if !errors.Is(err, errdefs.ErrPermissionDenied) {
		t.Errorf("update: %v", err)
	}
	if after := read(t, child, "devices", "devices.list"); after != before {
		t.Errorf("devices.list %q, before %q", after, before)
	}
	// With a child the kernel does not change the default.
	_, err = c.Update(&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{allowDevice(true, "a", -1, -1, "rwm")}})
	if err == nil || !strings.Contains(err.Error(), "no child cgroups") {
		t.Errorf("update: %v", err)
	}
}
