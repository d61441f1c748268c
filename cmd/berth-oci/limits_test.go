package main

import (
	"bufio"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestPauseAndResume(t *testing.T) {
	b, id := sleeper(t)
	b.do("resume", id).exits(1).says("not paused")
	b.do("pause", id).ok()
	b.status(id, "paused")
	b.do("pause", id).exits(1).says("not running")
	b.do("exec", id, "prog", "true").exits(255).says("--ignore-paused")
	b.do("resume", id).ok()
	b.status(id, "running")
	b.do("pause", id).ok()
	b.do("kill", id, "KILL").ok() // frozen or not
	b.eventually("stopped", func() bool { return b.state(id).Status == "stopped" })
	b.do("delete", id).ok()

	b, id = sleeper(t)
	b.do("pause", id).ok()
	b.do("delete", "--force", id).ok()
	b.nothingLeft()
}

// limit reads a cgroup file by its names on v1 and v2.
func limit(t *testing.T, id, v1, v2 string) string {
	t.Helper()
	p := filepath.Join("/sys/fs/cgroup", cgroupRoot, id, v2)
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		controller, _, _ := strings.Cut(v1, ".")
		p = filepath.Join("/sys/fs/cgroup", controller, cgroupRoot, id, v1)
	}
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestUpdate(t *testing.T) {
	b, id := sleeper(t)
	b.do("update", "--pids-limit", "33", "--memory", "64m", "--cpu-share", "512", id).ok()
	if got := limit(t, id, "pids.max", "pids.max"); got != "33" {
		t.Errorf("pids %s", got)
	}
	if got := limit(t, id, "memory.limit_in_bytes", "memory.max"); got != "67108864" {
		t.Errorf("memory %s", got)
	}
	file := filepath.Join(b.bundle, "r.json")
	if err := os.WriteFile(file, []byte(`{"pids": {"limit": 44}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	b.do("update", "--resources", file, id).ok()
	if got := limit(t, id, "pids.max", "pids.max"); got != "44" {
		t.Errorf("pids %s", got)
	}
	c := b.command("update", "-r", "-", id)
	c.Stdin = strings.NewReader(`{"pids": {"limit": 55}}`)
	b.finish(c).ok()
	if got := limit(t, id, "pids.max", "pids.max"); got != "55" {
		t.Errorf("pids %s", got)
	}
	if got := limit(t, id, "memory.limit_in_bytes", "memory.max"); got != "67108864" {
		t.Errorf("memory did not stay: %s", got)
	}
	b.do("update", "--memory", "lots", id).exits(1).says("--memory", "lots")
	b.do("update", "--cpu-period", "-5", id).exits(1).says("--cpu-period")
	b.do("update", "--l3-cache-schema", "L3:0=f", id).exits(1).says("linux.intelRdt")
	b.do("update", "--pids-limit", "1", "nosuch").exits(1).says("container does not exist")
	b.do("kill", id, "KILL").ok()
	b.eventually("stopped", func() bool { return b.state(id).Status == "stopped" })
	b.do("update", "--pids-limit", "1", id).exits(1).says("container not running")
}

func TestEveryUpdateFlagSetsItsField(t *testing.T) {
	for name, want := range map[string]string{
		"blkio-weight":       `{"blockIO":{"weight":7}}`,
		"cpu-period":         `{"cpu":{"period":7}}`,
		"cpu-quota":          `{"cpu":{"quota":7}}`,
		"cpu-burst":          `{"cpu":{"burst":7}}`,
		"cpu-share":          `{"cpu":{"shares":7}}`,
		"cpu-rt-period":      `{"cpu":{"realtimePeriod":7}}`,
		"cpu-rt-runtime":     `{"cpu":{"realtimeRuntime":7}}`,
		"cpu-idle":           `{"cpu":{"idle":7}}`,
		"cpuset-cpus":        `{"cpu":{"cpus":"7"}}`,
		"cpuset-mems":        `{"cpu":{"mems":"7"}}`,
		"memory":             `{"memory":{"limit":7}}`,
		"memory-reservation": `{"memory":{"reservation":7}}`,
		"memory-swap":        `{"memory":{"swap":7}}`,
		"pids-limit":         `{"pids":{"limit":7}}`,
		"kernel-memory":      `{}`,
		"kernel-memory-tcp":  `{}`,
	} {
		found := false
		for _, f := range limitFlags {
			if f.name != name {
				continue
			}
			found = true
			var r specs.LinuxResources
			if err := f.set(&r, "7"); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if got, _ := json.Marshal(r); string(got) != want {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
		if !found {
			t.Errorf("no flag %s", name)
		}
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"-1": -1, "0": 0, "4096": 4096, "64m": 64 << 20, "64M": 64 << 20, "1.5g": 3 << 29, "2KiB": 2048, "3kb": 3072, "10 MB": 10 << 20, "1t": 1 << 40, "5b": 5,
	} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("%q: %d %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "m", "-2", "1x", "1mm", "99999999999t", "NaN", "0x10"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("%q: %d", in, got)
		}
	}
}

func TestEvents(t *testing.T) {
	b, id := sleeper(t)
	var e struct {
		Type, ID string
		Data     struct{ Pids struct{ Current int } }
	}
	if err := json.Unmarshal([]byte(b.do("events", "--stats", id).ok().out), &e); err != nil {
		t.Fatal(err)
	}
	if e.Type != "stats" || e.ID != id || e.Data.Pids.Current < 1 {
		t.Fatalf("%+v", e)
	}
	b.do("events", "--interval", "0s", id).exits(1).says("interval")
	c := b.command("events", "--interval", "20ms", id)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for range 2 {
		if !lines.Scan() || json.Unmarshal(lines.Bytes(), &e) != nil || e.Type != "stats" {
			t.Fatalf("%q", lines.Text())
		}
	}
	b.do("kill", id, "KILL").ok()
	for lines.Scan() {
	}
	if err := c.Wait(); err != nil { // it ends with the container
		t.Fatal(err)
	}
	b.do("events", "--stats", id).exits(1).says("is not running")
}

func TestEventsTellOfOOMKills(t *testing.T) {
	b := newBench(t, "sleep")
	id := b.id()
	b.do("run", "-d", id).ok()
	b.do("update", "--memory", "24m", id).ok()
	c := b.command("events", "--interval", "1h", id)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Wait() }()
	defer func() { _ = c.Process.Kill() }()
	line := make(chan string)
	go func() {
		s := bufio.NewScanner(out)
		s.Scan()
		line <- s.Text()
	}()
	got := ""
	b.eventually("an oom event", func() bool {
		b.do("exec", id, "prog", "alloc", "64", "1")
		select {
		case got = <-line:
			return true
		default:
			return false
		}
	})
	if got != `{"type":"oom","id":"`+id+`"}` {
		t.Fatalf("%q", got)
	}
}
