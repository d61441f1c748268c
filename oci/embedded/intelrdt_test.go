package embedded

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
)

// fakeResctrl is a plain directory with the files of resctrl. It shows which
// directories and files are used, in which order and with which text. It does
// not show that a kernel takes the schemata (a plain file keeps the last write,
// resctrl merges them into its own form), that it counts groups, or that "0" in
// tasks moves the writer: no processor with RDT is at hand.
func fakeResctrl(t *testing.T) resctrl {
	t.Helper()
	on := resctrl{root: t.TempDir()}
	fill := func(dir string) error {
		return errors.Join(os.WriteFile(dir+"/tasks", nil, 0o644), os.WriteFile(dir+"/schemata", []byte("    MB:0=100;1=100\n    L3:0=7ff;1=7ff\n"), 0o644))
	}
	on.mkdir = func(dir string) error {
		if err := unix.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if filepath.Base(filepath.Dir(dir)) == "mon_groups" {
			return os.WriteFile(dir+"/tasks", nil, 0o644)
		}
		return errors.Join(fill(dir), os.Mkdir(dir+"/mon_groups", 0o755))
	}
	on.rmdir = func(dir string) error {
		if _, err := os.Stat(dir + "/tasks"); err != nil {
			return err
		}
		return os.RemoveAll(dir)
	}
	err := errors.Join(fill(on.root), os.MkdirAll(on.root+"/info/MB", 0o755), os.Mkdir(on.root+"/mon_groups", 0o755), os.Mkdir(on.root+"/mon_data", 0o755),
		os.WriteFile(on.root+"/info/last_cmd_status", []byte("ok\n"), 0o644), os.WriteFile(on.root+"/info/MB/bandwidth_gran", []byte("10\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	return on
}

func (on resctrl) has(path string) bool {
	_, err := os.Stat(filepath.Join(on.root, path))
	return err == nil
}

func (on resctrl) schemata(t *testing.T, group string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(on.root, group, "schemata"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestRDTOwnGroup(t *testing.T) {
	on := fakeResctrl(t)
	cid := id.NewContainer()
	r, err := openRDTAt(on, cid, &specs.LinuxIntelRdt{Schemata: []string{"L3:0=7f0;1=1f", "MB:0=20;1=70"}, EnableMonitoring: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := on.schemata(t, string(cid)); !strings.HasPrefix(got, "L3:0=7f0;1=1f\nMB:0=20;1=70\n") {
		t.Errorf("schemata: %q", got)
	}
	files, err := r.taskFiles()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{string(cid) + "/tasks", string(cid) + "/mon_groups/" + string(cid) + "/tasks"} {
		if i >= len(files) || files[i].Name() != filepath.Join(on.root, want) {
			t.Fatalf("task files: %v", files)
		}
		if _, err := files[i].WriteString("0"); err != nil {
			t.Error(err)
		}
		files[i].Close()
	}
	// Another process deletes it, twice.
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var again rdt
	if err := json.Unmarshal(b, &again); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := again.deleteFrom(on); err != nil {
			t.Error(err)
		}
	}
	if on.has(string(cid)) {
		t.Error("the group is left")
	}
	if _, err := r.taskFiles(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("task files of a deleted group: %v", err)
	}
	if err := (&rdt{Group: "/nowhere/group", Made: true, Monitor: "/nowhere/monitor"}).delete(); err != nil {
		t.Errorf("delete of what is gone: %v", err)
	}
	// A group of that name which others made is used and stays.
	if err := on.mkdir(filepath.Join(on.root, string(cid))); err != nil {
		t.Fatal(err)
	}
	if r, err = openRDTAt(on, cid, &specs.LinuxIntelRdt{}); err != nil {
		t.Fatal(err)
	}
	if err := r.deleteFrom(on); err != nil || !on.has(string(cid)) {
		t.Errorf("a group made by others was deleted: %v", err)
	}
}

func TestRDTClosID(t *testing.T) {
	on := fakeResctrl(t)
	cid := id.NewContainer()
	// Without schemas it must exist.
	if _, err := openRDTAt(on, cid, &specs.LinuxIntelRdt{ClosID: "gold"}); !errors.Is(err, errdefs.ErrFailedPrecondition) || on.has("gold") {
		t.Errorf("missing group: %v", err)
	}
	// With one it is made, and stays; the monitoring group does not.
	r, err := openRDTAt(on, cid, &specs.LinuxIntelRdt{ClosID: "gold", L3CacheSchema: "L3:0=f;1=ff", MemBwSchema: "MB:0=50", EnableMonitoring: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := on.schemata(t, "gold"); !strings.HasPrefix(got, "MB:0=50\n") { // over the L3 line, in a plain file
		t.Errorf("schemata: %q", got)
	}
	if !on.has("gold/mon_groups/" + string(cid)) {
		t.Error("no monitoring group")
	}
	if err := r.deleteFrom(on); err != nil || !on.has("gold") || on.has("gold/mon_groups/"+string(cid)) {
		t.Errorf("after delete: %v", err)
	}
	// An existing one is compared, and only schemata is written.
	have := "    MB:0= 50;1= 20\n    L3:0=00f;1=0ff\n"
	for _, c := range []struct {
		in   specs.LinuxIntelRdt
		want error
	}{
		{specs.LinuxIntelRdt{L3CacheSchema: "L3:1=0xff;0=0000f"}, nil},
		{specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f"}, nil},
		{specs.LinuxIntelRdt{MemBwSchema: "MB:1=11"}, nil}, // rounded up to 20
		{specs.LinuxIntelRdt{MemBwSchema: "MB:1=21"}, errdefs.ErrFailedPrecondition},
		{specs.LinuxIntelRdt{L3CacheSchema: "L3:0=1f;1=ff"}, errdefs.ErrFailedPrecondition},
		{specs.LinuxIntelRdt{L3CacheSchema: "L3:2=f"}, errdefs.ErrFailedPrecondition},
		{specs.LinuxIntelRdt{L3CacheSchema: "L3CODE:0=f"}, errdefs.ErrFailedPrecondition},
		{specs.LinuxIntelRdt{L3CacheSchema: "L3:0"}, errdefs.ErrInvalidArgument},
		{specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f;x=1"}, errdefs.ErrInvalidArgument},
	} {
		if err := os.WriteFile(on.root+"/gold/schemata", []byte(have), 0o644); err != nil {
			t.Fatal(err)
		}
		c.in.ClosID = "gold"
		_, err := openRDTAt(on, cid, &c.in)
		if !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c.in, err)
		}
		if err != nil && !strings.Contains(err.Error(), "linux.intelRdt.") {
			t.Errorf("%+v: names no field: %v", c.in, err)
		}
		if got := on.schemata(t, "gold"); got != have {
			t.Errorf("%+v: wrote %q", c.in, got)
		}
	}
	if _, err := openRDTAt(on, cid, &specs.LinuxIntelRdt{ClosID: "gold", Schemata: []string{"L3:0=1;1=1"}}); err != nil || !strings.HasPrefix(on.schemata(t, "gold"), "L3:0=1;1=1\n") {
		t.Errorf("schemata of an existing group: %q %v", on.schemata(t, "gold"), err)
	}
	// "/" is the default group.
	r, err = openRDTAt(on, cid, &specs.LinuxIntelRdt{ClosID: "/", EnableMonitoring: true})
	if err != nil {
		t.Fatal(err)
	}
	if !on.has("mon_groups/"+string(cid)) || r.Group != on.root {
		t.Errorf("default group: %+v", r)
	}
	if err := r.deleteFrom(on); err != nil || !on.has("schemata") || on.has("mon_groups/"+string(cid)) {
		t.Errorf("after delete: %v", err)
	}
}

// TestRDTFailure: what was made before a failure is removed, and the kernel's
// explanation is in the error.
func TestRDTFailure(t *testing.T) {
	on := fakeResctrl(t)
	mkdir := on.mkdir
	on.mkdir = func(dir string) error {
		if filepath.Base(filepath.Dir(dir)) == "mon_groups" {
			return unix.ENOSPC
		}
		return mkdir(dir)
	}
	if err := os.WriteFile(on.root+"/info/last_cmd_status", []byte("out of RMIDs\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, clos := range []string{"", "silver"} {
		_, err := openRDTAt(on, "ctr", &specs.LinuxIntelRdt{ClosID: clos, Schemata: []string{"L3:0=1"}, EnableMonitoring: true})
		if !errors.Is(err, errdefs.ErrResourceExhausted) || !strings.Contains(err.Error(), "linux.intelRdt.enableMonitoring") || !strings.Contains(err.Error(), "out of RMIDs") {
			t.Errorf("closID %q: %v", clos, err)
		}
		if on.has("ctr") || on.has("silver") {
			t.Errorf("closID %q: the group is left", clos)
		}
	}
}

func TestRDTRefused(t *testing.T) {
	for field, c := range map[string]specs.LinuxIntelRdt{
		"closID ":       {ClosID: "a/b"},
		"closID \"..":   {ClosID: ".."},
		"closID \"info": {ClosID: "info"},
		"memBwSchema":   {MemBwSchema: "L3:0=1"},
		"l3CacheSchema": {L3CacheSchema: "L3:0=1\nL3:1=1"},
		"schemata[1]":   {Schemata: []string{"L3:0=1", "a\nb"}},
		"schemata":      {Schemata: []string{strings.Repeat("x", maxSchemata)}},
	} {
		_, err := openRDT("ctr", &c)
		refused(t, err, "linux.intelRdt."+field)
	}
	_, err := openRDT("mon_groups", &specs.LinuxIntelRdt{})
	refused(t, err, "linux.intelRdt: the container's id")
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if resctrlRoot(string(b)) == "" {
		_, err := openRDT("ctr", &specs.LinuxIntelRdt{})
		if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "linux.intelRdt") || !strings.Contains(err.Error(), "mount -t resctrl") {
			t.Errorf("not mounted: %v", err)
		}
	}
	for line, want := range map[string]string{
		"40 28 0:34 / /sys/fs/resctrl rw,relatime - resctrl resctrl rw,cdp\n":              "/sys/fs/resctrl",
		"39 28 0:34 /gold /mnt rw - resctrl r rw\n40 28 0:34 / /a\\040b rw - resctrl r rw": "/a b",
		"40 28 0:34 / /resctrl rw shared:1 - tmpfs resctrl rw\n":                           "",
		"40 28 0:34 / /x rw shared:1 master:2 - resctrl resctrl rw\n":                      "/x",
		"- resctrl": "",
		"":          "",
	} {
		if got := resctrlRoot(line); got != want {
			t.Errorf("%q: %q", line, got)
		}
	}
}

func TestRDTUpdate(t *testing.T) {
	on := fakeResctrl(t)
	r, err := openRDTAt(on, "c1", &specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.update(on, "L3:0=3", ""); err != nil {
		t.Fatal(err)
	}
	if got := on.schemata(t, "c1"); !strings.HasPrefix(got, "L3:0=3\n") {
		t.Errorf("schemata %q", got)
	}
	if err := r.update(on, "", "MB:0=20"); err != nil {
		t.Fatal(err)
	}
	if got := on.schemata(t, "c1"); !strings.HasPrefix(got, "MB:0=20\n") {
		t.Errorf("schemata %q", got)
	}
	refused(t, r.update(on, "", "L3:0=1"), "linux.intelRdt.memBwSchema")
	refused(t, r.update(on, "L3:0=1\nMB:0=1", ""), "linux.intelRdt.l3CacheSchema")
	none := &Container{id: "c1"}
	if err := none.UpdateRDT("L3:0=1", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a group: %v", err)
	}
}

// TestRDTSurvivesTheCommand: a group is deleted, and not written again, by a
// command that knows it from the record.
func TestRDTSurvivesTheCommand(t *testing.T) {
	on := fakeResctrl(t)
	made, err := openRDTAt(on, "c1", &specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f", EnableMonitoring: true})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(Saved{RDT: made})
	if err != nil {
		t.Fatal(err)
	}
	var s Saved
	if err := json.Unmarshal(b, &s); err != nil || s.RDT == nil || *s.RDT != *made {
		t.Fatalf("%s: %+v, %v", b, s.RDT, err)
	}
	if err := s.RDT.deleteFrom(on); err != nil || on.has("c1") {
		t.Errorf("delete: %v, group is there: %v", err, on.has("c1"))
	}
}
