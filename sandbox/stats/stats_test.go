package stats

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"

	"github.com/berth-runtime/berth/sandbox/model"
)

func write(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

var v2files = map[string]string{
	"cpu.stat":            "usage_usec 2500000\nuser_usec 1\nsystem_usec 2\n",
	"memory.current":      "1000000\n",
	"memory.stat":         "anon 300000\nfile 600000\ninactive_file 400000\npgfault 77\npgmajfault 3\n",
	"memory.max":          "2000000\n",
	"memory.swap.current": "5000\n",
	"memory.swap.max":     "8000\n",
	"pids.current":        "4\n",
	"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
	"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
}

func TestReadV2(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "pod/c"), v2files)
	c := NewCollector(Hierarchies{Unified: root})
	s, err := c.Read("/pod/c")
	if err != nil {
		t.Fatal(err)
	}
	if s.At.IsZero() || s.CPUNanoseconds != 2500000000 || s.MemoryUsage != 1000000 || s.WorkingSet != 600000 || s.RSS != 300000 || s.PageFaults != 77 || s.MajorPageFaults != 3 || s.Pids != 4 {
		t.Errorf("got %+v", s)
	}
	for name, v := range map[string][2]uint64{"available": {*s.MemoryAvailable, 1400000}, "swap": {*s.SwapUsage, 5000}, "swap available": {*s.SwapAvailable, 3000}} {
		if v[0] != v[1] {
			t.Errorf("%s: got %d, want %d", name, v[0], v[1])
		}
	}
	want := model.PSI{Avg10: 1.5, Avg60: .25, Total: 12000}
	if s.CPUPressure == nil || *s.CPUPressure.Some != want || s.CPUPressure.Full.Total != 7000 || s.MemoryPressure.Full != nil || s.IOPressure != nil {
		t.Errorf("pressure: %+v %+v %+v", s.CPUPressure, s.MemoryPressure, s.IOPressure)
	}
	write(t, filepath.Join(root, "pod/c"), map[string]string{"memory.max": "max\n", "memory.swap.max": "max\n", "memory.current": "100\n"})
	s, err = c.Read("pod/c")
	if err != nil || s.MemoryAvailable != nil || s.SwapAvailable != nil || s.SwapUsage == nil || s.WorkingSet != 0 {
		t.Errorf("unlimited: %+v, %v", s, err)
	}
}

func TestReadV1(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "cpu/c"), map[string]string{"cpuacct.usage": "42\n"})
	mem := filepath.Join(root, "mem/c")
	write(t, mem, map[string]string{
		"memory.usage_in_bytes": "1000\n", "memory.limit_in_bytes": "4000\n", "memory.memsw.limit_in_bytes": "4500\n",
		"memory.stat": "rss 1\nhierarchical_memory_limit 3000\nhierarchical_memsw_limit 4500\ntotal_rss 300\ntotal_inactive_file 200\ntotal_pgfault 9\ntotal_pgmajfault 1\ntotal_swap 50\n",
	})
	c := NewCollector(Hierarchies{V1: map[string]string{"cpuacct": root + "/cpu", "memory": root + "/mem", "pids": root + "/pids"}})
	s, err := c.Read("/c") // its pids cgroup is missing: not an error
	if err != nil {
		t.Fatal(err)
	}
	if s.CPUNanoseconds != 42 || s.WorkingSet != 800 || s.RSS != 300 || *s.MemoryAvailable != 3200 || *s.SwapUsage != 50 || *s.SwapAvailable != 450 || s.CPUPressure != nil {
		t.Errorf("got %+v", s)
	}
	write(t, mem, map[string]string{"memory.stat": "hierarchical_memory_limit 9223372036854771712\ntotal_rss 300\n"})
	if s, err = c.Read("/c"); err != nil || s.MemoryAvailable != nil || s.SwapUsage != nil {
		t.Errorf("unlimited: %+v, %v", s, err)
	}
}

func TestMissingAndBadCgroups(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "c"), map[string]string{"cpu.stat": "usage_usec 1\n", "memory.current": "much\n"})
	for _, h := range []Hierarchies{{Unified: root}, {V1: map[string]string{"cpuacct": root, "memory": root}}} {
		if _, err := NewCollector(h).Read("/gone"); !errdefs.IsNotFound(err) {
			t.Errorf("gone: got %v", err)
		}
	}
	c := NewCollector(Hierarchies{Unified: root})
	if _, err := c.Read("/c"); err == nil || errdefs.IsNotFound(err) {
		t.Errorf("malformed number: got %v", err)
	}
	if _, err := c.Read("/a/../../etc"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("dots: got %v", err)
	}
}

func TestNanocores(t *testing.T) {
	now := time.Unix(1000, 0)
	c := NewCollector(Hierarchies{})
	step := func(after time.Duration, cpu uint64) string {
		now = now.Add(after)
		if r := c.rate("/c", now, cpu); r != nil {
			return strconv.FormatUint(*r, 10)
		}
		return "nil"
	}
	for i, s := range []struct {
		after time.Duration
		cpu   uint64
		want  string
	}{
		{0, 1e9, "nil"},
		{100 * time.Millisecond, 11e8, "nil"},         // too short a window
		{900 * time.Millisecond, 15e8, "500000000"},   // half a core over 1 s
		{10 * time.Millisecond, 16e8, "500000000"},    // the last real window
		{1990 * time.Millisecond, 55e8, "2000000000"}, // over 2 s
		{time.Second, 1, "nil"},                       // counter restarted
	} {
		if got := step(s.after, s.cpu); got != s.want {
			t.Errorf("step %d: got %s, want %s", i, got, s.want)
		}
	}
	c.rate("/d", now.Add(time.Hour), 1)
	if len(c.samples) != 1 {
		t.Errorf("%d samples are kept, want the fresh one", len(c.samples))
	}
}

func TestHierarchies(t *testing.T) {
	v2 := &mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: "/sys/fs/cgroup/unified"}
	mem := &mountinfo.Info{FSType: "cgroup", Root: "/", Mountpoint: "/m", VFSOptions: "rw,memory"}
	cpu := &mountinfo.Info{FSType: "cgroup", Root: "/", Mountpoint: "/c", VFSOptions: "rw,cpu,cpuacct"}
	part := &mountinfo.Info{FSType: "cgroup", Root: "/docker", Mountpoint: "/x", VFSOptions: "rw,memory"}
	if h, err := hierarchies([]*mountinfo.Info{v2, part, mem, cpu}); err != nil || h.Unified != "" || h.V1["memory"] != "/m" || h.V1["cpuacct"] != "/c" {
		t.Errorf("hybrid: %+v, %v", h, err)
	}
	if h, err := hierarchies([]*mountinfo.Info{part, v2}); err != nil || h.Unified != "/sys/fs/cgroup/unified" {
		t.Errorf("unified: %+v, %v", h, err)
	}
	if _, err := hierarchies(nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("none: got %v", err)
	}
}

// makeCgroups makes n empty cgroups below one of the test's own.
func makeCgroups(t testing.TB, h Hierarchies, n int) []string {
	t.Helper()
	parent := fmt.Sprintf("/berth-stats-%d", os.Getpid())
	roots := []string{h.Unified}
	if h.Unified == "" {
		roots = nil
		for _, m := range h.V1 {
			roots = append(roots, m)
		}
	}
	var made []string
	t.Cleanup(func() {
		for i := len(made) - 1; i >= 0; i-- {
			if err := os.Remove(made[i]); err != nil {
				t.Error(err)
			}
		}
	})
	mkdir := func(dir string) {
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, os.ErrExist) { // cpu and cpuacct may be one hierarchy
			return
		}
		if err != nil {
			t.Skipf("needs to make cgroups: %v", err)
		}
		made = append(made, dir)
	}
	var dirs []string
	for _, r := range roots {
		mkdir(filepath.Join(r, parent))
	}
	if h.Unified != "" { // a parent hands down what it was given
		if err := os.WriteFile(filepath.Join(h.Unified, parent, "cgroup.subtree_control"), []byte("+memory +pids"), 0); err != nil {
			t.Skipf("needs a root cgroup that hands memory and pids down: %v", err)
		}
	}
	for i := range n {
		d := fmt.Sprintf("%s/%d", parent, i)
		for _, r := range roots {
			mkdir(filepath.Join(r, d))
		}
		dirs = append(dirs, d)
	}
	return dirs
}

func TestRealCgroup(t *testing.T) {
	h, err := FindHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	dir := makeCgroups(t, h, 1)[0]
	roots := h.V1
	if h.Unified != "" {
		roots = map[string]string{"": h.Unified}
	}
	cmd := exec.Command("sh", "-c", "read x; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; read x")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	for _, r := range roots {
		if err := os.WriteFile(filepath.Join(r, dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	s, err := NewCollector(h).Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if s.CPUNanoseconds == 0 || s.MemoryUsage == 0 || s.Pids != 1 || s.At.IsZero() {
		t.Errorf("got %+v", s)
	}
}

// BenchmarkHundred is the reading behind ListContainerStats of 100 containers
// (promise: 10 ms).
func BenchmarkHundred(b *testing.B) {
	h, err := FindHierarchies()
	if err != nil {
		b.Fatal(err)
	}
	dirs := makeCgroups(b, h, 100)
	c := NewCollector(h)
	b.ReportAllocs()
	for b.Loop() {
		for _, d := range dirs {
			if _, err := c.Read(d); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkV2Files(b *testing.B) {
	root := b.TempDir()
	write(b, filepath.Join(root, "c"), v2files)
	c := NewCollector(Hierarchies{Unified: root})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Read("/c"); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzParsers(f *testing.F) {
	for _, text := range v2files {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		keys(text, func(k []byte, v uint64) {
			if !bytes.Contains(text, append(bytes.Clone(k), ' ')) {
				t.Fatalf("key %q with %d is not in the text", k, v)
			}
		})
		if p := pressure(text); p != nil && p.Some == nil && p.Full == nil {
			t.Fatal("an empty reading is not nil")
		}
	})
}
