package cgroup

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// files writes the files of a made-up cgroup.
func files(t *testing.T, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestStatsOfFilesV2(t *testing.T) {
	dir := files(t, map[string]string{
		"cpu.stat":            "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 5\nnr_throttled 2\nthrottled_usec 7",
		"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.01 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=4",
		"memory.current":      "1000",
		"memory.max":          "5000",
		"memory.peak":         "2000",
		"memory.swap.current": "10",
		"memory.swap.max":     "max",
		"memory.stat":         "anon 600\nfile 300\nkernel 50",
		"memory.events":       "low 0\nhigh 0\nmax 3\noom 0\noom_kill 0",
		"pids.current":        "4",
		"pids.max":            "max",
		"io.stat":             "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n7:1",
		"rdma.current":        "mlx4_0 hca_handle=2 hca_object=2000",
		"rdma.max":            "mlx4_0 hca_handle=max hca_object=3000",
	})
	s, r := &Stats{Hugetlb: map[string]Hugetlb{}}, &reader{}
	r.statsV2(dir, s)
	if r.err != nil {
		t.Fatal(r.err)
	}
	want := `{"cpu":{"usage":{"total":30000,"kernel":20000,"user":10000},"throttling":{"periods":5,"throttledPeriods":2,"throttledTime":7000},` +
		`"psi":{"some":{"avg10":1.5,"avg60":0.25,"avg300":0.01,"total":123},"full":{"avg10":0,"avg60":0,"avg300":0,"total":4}}},` +
		`"cpuset":{"cpu_exclusive":0,"mem_hardwall":0,"mem_exclusive":0,"memory_migrate":0,"memory_spread_page":0,"memory_spread_slab":0,"memory_pressure":0,"sched_load_balance":0,"sched_relax_domain_level":0},` +
		`"memory":{"cache":300,"usage":{"limit":5000,"usage":1000,"max":2000,"failcnt":3},"swap":{"limit":18446744073709551615,"usage":1010,"failcnt":0},"kernel":{"limit":0,"usage":50,"failcnt":0},"raw":{"anon":600,"file":300,"kernel":50}},` +
		`"pids":{"current":4},"blkio":{"ioServiceBytesRecursive":[{"major":8,"op":"Read","value":4096},{"major":8,"op":"Write"}],"ioServicedRecursive":[{"major":8,"op":"Read","value":1},{"major":8,"op":"Write"}]},` +
		`"hugetlb":{},"rdma":{"limit":[{"device":"mlx4_0","hca_handles":4294967295,"hca_objects":3000}],"current":[{"device":"mlx4_0","hca_handles":2,"hca_objects":2000}]},"intel_rdt":{},"network_interfaces":null}`
	if got := asJSON(t, s); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestStatsOfFilesV1(t *testing.T) {
	at := files(t, map[string]string{
		"cpu.stat":                             "nr_periods 5\nnr_throttled 2\nthrottled_time 7",
		"cpuacct.stat":                         "user 3\nsystem 2",
		"cpuacct.usage":                        "51",
		"cpuacct.usage_percpu":                 "20 31 ",
		"cpuacct.usage_all":                    "cpu user system\n0 1 2\n1 3 4",
		"cpuset.cpus":                          "0-1,3",
		"cpuset.mems":                          "0",
		"cpuset.sched_relax_domain_level":      "-1",
		"memory.stat":                          "cache 5\nrss 6",
		"memory.usage_in_bytes":                "100",
		"memory.limit_in_bytes":                "200",
		"memory.failcnt":                       "1",
		"memory.max_usage_in_bytes":            "150",
		"memory.memsw.usage_in_bytes":          "101",
		"memory.kmem.tcp.usage_in_bytes":       "9",
		"pids.current":                         "2",
		"pids.max":                             "7",
		"blkio.throttle.io_service_bytes":      "8:0 Read 10\n8:0 Total 10\nTotal 10",
		"blkio.throttle.io_serviced_recursive": "",
	})
	c := &Cgroup{host: &Host{V1: []Controller{{}}}, dirs: []dir{{Controller: Controller{Names: []string{"cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "name=x"}}, path: at}}}
	s, r := &Stats{}, &reader{}
	r.statsV1(c, s)
	if r.err != nil {
		t.Fatal(r.err)
	}
	if got := fmt.Sprintf("%+v", s.CPU.Usage); got != "{Total:51 Percpu:[20 31] PercpuKernel:[2 4] PercpuUser:[1 3] Kernel:20000000 User:30000000}" {
		t.Error(got)
	}
	if got := fmt.Sprint(s.CPUSet.CPUs, s.CPUSet.Mems, s.CPUSet.SchedRelaxDomainLevel, s.Pids); got != "[0 1 3] [0] -1 {2 7}" {
		t.Error(got)
	}
	if got := fmt.Sprintf("%+v %+v %d %d %d", s.Memory.Usage, s.Memory.Raw, s.Memory.Cache, s.Memory.Swap.Usage, s.Memory.KernelTCP.Usage); got != "{Limit:200 Usage:100 Max:150 Failcnt:1} map[cache:5 rss:6] 5 101 9" {
		t.Error(got)
	}
	if got := asJSON(t, s.Blkio); got != `{"ioServiceBytesRecursive":[{"major":8,"op":"Read","value":10},{"major":8,"op":"Total","value":10}]}` {
		t.Error(got)
	}
	r.cpuset(files(t, map[string]string{"cpuset.cpus": "3-x"}), &s.CPUSet)
	if r.err == nil {
		t.Error("a list that is none is accepted")
	}
}

func TestStatsLive(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		r := &specs.LinuxResources{}
		if !h.V2() {
			r.Pids, r.Memory = &specs.LinuxPids{Limit: ptr(int64(50))}, &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}
		}
		c := create(t, h, r)
		cmd := shell("read x; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo; read x")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		start(t, c, cmd)
		fmt.Fprintln(in)
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		s, err := c.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if s.CPU.Usage.Total == 0 || s.Pids.Current == 0 {
			t.Errorf("%+v %+v", s.CPU, s.Pids)
		}
		if !h.V2() && (s.Memory.Usage.Limit != 64<<20 || s.Pids.Limit != 50 || len(s.CPU.Usage.Percpu) == 0 || len(s.CPUSet.CPUs) == 0) {
			t.Errorf("%s", asJSON(t, s))
		}
		if _, err := os.Stat(filepath.Join(c.dirs[0].path, "cpu.pressure")); h.V2() && err == nil && s.CPU.PSI == nil {
			t.Error("no pressure, but the kernel has it")
		}
		if err := c.KillAll(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if err := c.Delete(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Stats(); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("stats of a cgroup that is gone: %v", err)
		}
	})
}

func TestPageSizes(t *testing.T) {
	for _, s := range pageSizes() {
		if !isPageSize(s) {
			t.Errorf("%q", s)
		}
	}
	for _, bad := range []string{"", "2M", "MB", "0MB", "2TB", "+2MB", "2MB/../x", strings.Repeat("9", 30) + "MB"} {
		if isPageSize(bad) {
			t.Errorf("%q is accepted", bad)
		}
	}
}
