package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// Bad configs name their JSON field, end with exit code 1 and leave nothing.
func TestBadInputLeavesNothing(t *testing.T) {
	b := newBench(t, "true")
	if err := os.Symlink("/etc", filepath.Join(b.bundle, "rootfs/out")); err != nil {
		t.Fatal(err)
	}
	good, err := json.Marshal(b.spec)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*specs.Spec)
		says   string
	}{
		"no version":       {func(s *specs.Spec) { s.Version = "" }, "ociVersion"},
		"no semver":        {func(s *specs.Spec) { s.Version = "one" }, "ociVersion"},
		"version 2":        {func(s *specs.Spec) { s.Version = "2.0.0" }, "ociVersion"},
		"no root":          {func(s *specs.Spec) { s.Root = nil }, "root.path"},
		"missing rootfs":   {func(s *specs.Spec) { s.Root.Path = "nosuch" }, "root.path"},
		"rootfs is a file": {func(s *specs.Spec) { s.Root.Path = "config.json" }, "root"},
		"relative cwd":     {func(s *specs.Spec) { s.Process.Cwd = "tmp" }, "process.cwd"},
		"no process":       {func(s *specs.Spec) { s.Process = nil }, "process"},
		"no args":          {func(s *specs.Spec) { s.Process.Args = nil }, "process.args"},
		"unknown rlimit":   {func(s *specs.Spec) { s.Process.Rlimits[0].Type = "RLIMIT_NOPE" }, "process.rlimits"},
		"namespace path that is none": {func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/etc/passwd" },
			"linux.namespaces"},
		"namespace of another type": {func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/proc/self/ns/uts" },
			"linux.namespaces"},
		"unknown namespace": {func(s *specs.Spec) { s.Linux.Namespaces[1].Type = "nope" }, "linux.namespaces"},
		"missing bind source": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/nosuch", Options: []string{"bind"}})
		}, `mounts[7] "/x": source`},
		"unknown mount option": {func(s *specs.Spec) { s.Mounts[1].Options = []string{"nosuch"} }, `mounts[1] "/dev"`},
		"sysctl of the host":   {func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.panic": "1"} }, "linux.sysctl"},
		"cgroup with dots":     {func(s *specs.Spec) { s.Linux.CgroupsPath = "/a/../../b" }, "linux.cgroupsPath"},
	} {
		t.Run(name, func(t *testing.T) {
			b.t = t
			id := b.id()
			var s specs.Spec
			if err := json.Unmarshal(good, &s); err != nil {
				t.Fatal(err)
			}
			s.Linux.CgroupsPath = b.spec.Linux.CgroupsPath
			c.change(&s)
			data, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			b.writeRaw(data)
			for _, cmd := range []string{"create", "run"} {
				b.do(cmd, id).exits(1).says(c.says)
			}
			b.nothingLeft()
		})
	}
	b.t = t
}

// A mount on a symlink lands inside the rootfs, where a process in it would find it.
func TestMountOnASymlinkStaysInside(t *testing.T) {
	b := newBench(t, "ls", "/etc/mounted")
	outside := filepath.Join(b.bundle, "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(b.bundle, "rootfs/out")); err != nil {
		t.Fatal(err)
	}
	b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/out", Type: "tmpfs", Source: "tmpfs"})
	b.spec.Process.Args = []string{"prog", "ls", outside}
	b.spec.Root.Readonly = false
	b.do("run", b.id()).ok()
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Fatalf("written outside: %v", left)
	}
}

func TestMalformedConfig(t *testing.T) {
	b := newBench(t, "true")
	for name, c := range map[string]struct {
		config string
		says   []string
	}{
		"syntax":    {"{\n  \"ociVersion\": \"1.0.0\",\n  oops\n}", []string{"config.json", "line 3, column 3"}},
		"truncated": {"{\n\"process\": {", []string{"config.json", "line 2"}},
		"type":      {"{\n\"process\": {\"cwd\": 5}}", []string{"process.cwd", "line 2"}},
		"null":      {"null", []string{"config.json"}},
		"empty":     {"", []string{"config.json"}},
	} {
		t.Run(name, func(t *testing.T) {
			b.t = t
			b.writeRaw([]byte(c.config))
			b.do("create", "x").exits(1).says(c.says...)
			b.nothingLeft()
		})
	}
	b.t = t
	if err := os.Remove(filepath.Join(b.bundle, "config.json")); err != nil {
		t.Fatal(err)
	}
	b.do("run", "x").exits(1).says("config.json not found")
	b.do("run", "--bundle", "/nosuch", "x").exits(1).says("--bundle")
	f, err := os.Create(filepath.Join(b.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(maxConfig + 1); err != nil {
		t.Fatal(err)
	}
	b.do("run", "x").exits(1).says("larger than 64 MiB")
}

func TestUnknownFieldsArePassedOver(t *testing.T) {
	b := newBench(t, "true")
	id := b.id()
	data, err := os.ReadFile(filepath.Join(b.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	b.writeRaw([]byte(strings.Replace(string(data), "{", `{"x-new": {"a": 1},`, 1)))
	b.do("run", id).ok()
}

func TestBadIDs(t *testing.T) {
	b := newBench(t, "true")
	for _, id := range []string{"", ".", "..", "a/b", "a b", "../x", "ä", "a\n", strings.Repeat("x", 1025)} {
		for _, cmd := range []string{"create", "run", "state", "start", "kill", "delete"} {
			b.do(cmd, "--", id).exits(1).says("container")
		}
	}
	b.nothingLeft()
}

func TestVersions(t *testing.T) {
	for _, v := range []string{"1.0.0", "1.0.2-dev", "1.3.0", "1.2.0-rc.1+build", "1.99.0"} {
		if err := checkVersion(v); err != nil {
			t.Error(err)
		}
	}
	for _, v := range []string{"", "1", "1.0", "v1.0.0", "0.9.0", "2.0.0", "1.0.x", "1.0.0.0", "-1.0.0"} {
		if checkVersion(v) == nil {
			t.Errorf("%q is taken", v)
		}
	}
}

func TestLog(t *testing.T) {
	b := newBench(t, "true")
	log := filepath.Join(b.bundle, "log")
	last := func() map[string]any {
		t.Helper()
		data, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		var m map[string]any
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &m); err != nil {
			t.Fatalf("%v: %s", err, data)
		}
		return m
	}
	b.do("--log", log, "--log-format", "json", "state", "nosuch").exits(1).says("container does not exist")
	if m := last(); m["level"] != "error" || m["msg"] != "nosuch: container does not exist" || m["time"] == "" {
		t.Fatalf("%v", m)
	}
	b.do("--log-format=json", "--log="+log, "--debug", "--systemd-cgroup=false", "--rootless", "auto", "--criu", "x", "run", b.id()).ok()
	if m := last(); m["level"] != "debug" {
		t.Fatalf("%v", m)
	}
	if r := b.do("--debug", "run", b.id()).ok(); !strings.Contains(r.err, "level=debug") {
		t.Fatalf("%q", r.err)
	}
	b.do("--log-format", "xml", "list").exits(1).says("--log-format")
	b.do("--rootless", "maybe", "list").exits(1).says("--rootless")
	b.do("--log", "/nosuch/log", "list").exits(1).says("--log")
}

func TestRoot(t *testing.T) {
	b := newBench(t, "true")
	b.do("list").exits(1).says("--root") // named, and not there
	c := b.command("list")
	c.Args = []string{binary, "--root", "/", "list"}
	b.finish(c).exits(1).says("--root")
}

func TestSpecAndFeatures(t *testing.T) {
	b := newBench(t, "true")
	dir := t.TempDir()
	b.do("spec", "--bundle", dir).ok()
	b.do("spec", "--bundle", dir).exits(1).says("exists")
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil || s.Version != specs.Version {
		t.Fatalf("%v %v", s.Version, err)
	}
	b.spec = &s
	s.Process.Terminal, s.Process.Args = false, []string{"/bin/prog", "true"}
	b.do("run", b.id()).ok()

	if err := os.Remove(filepath.Join(dir, "config.json")); err != nil {
		t.Fatal(err)
	}
	b.do("spec", "-b", dir, "--rootless").ok()
	if data, err = os.ReadFile(filepath.Join(dir, "config.json")); err != nil {
		t.Fatal(err)
	}
	s = specs.Spec{}
	if err := json.Unmarshal(data, &s); err != nil || len(s.Linux.UIDMappings) != 1 {
		t.Fatalf("%+v %v", s.Linux, err)
	}
	s.Process.Terminal, s.Process.Args = false, []string{"/bin/prog", "id"}
	b.do("run", b.id()).ok().prints("uid=0 gid=0 groups=\n")

	var f features.Features
	if err := json.Unmarshal([]byte(b.do("features").ok().out), &f); err != nil || f.OCIVersionMax == "" {
		t.Fatalf("%+v %v", f, err)
	}
}

func TestHelpAndVersion(t *testing.T) {
	b := newBench(t, "true")
	for _, flag := range []string{"-v", "--version"} {
		if out := b.do(flag).ok().out; !strings.HasPrefix(out, "berth-oci version ") || !strings.Contains(out, "\nspec: "+specs.Version) {
			t.Fatalf("%q", out)
		}
	}
	for _, c := range (&app{}).command().Commands() {
		if out := b.do(c.Name(), "--help").ok().out; !strings.Contains(out, "berth-oci "+c.Name()) {
			t.Errorf("%s --help: %q", c.Name(), out)
		}
	}
	b.do("nosuch").exits(1).says("nosuch")
	b.do("state").exits(1).says(`"state" requires exactly 1 argument`)
	b.do("state", "--nosuch", "x").exits(1).says("nosuch")
}
