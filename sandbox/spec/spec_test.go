package spec

import (
	"bytes"
	"encoding/json"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/sandbox/model"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// node is a made-up node: every path exists but /missing, /link leads to
// /target, /shared is on a shared mount and /slave on a slave one.
func node() Node {
	return Node{
		ReadFile: func(p string) ([]byte, error) {
			switch p {
			case "/profiles/good.json":
				return []byte(`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read","write"],"action":"SCMP_ACT_ALLOW"}]}`), nil
			case "/profiles/empty.json":
				return []byte(`{}`), nil
			case "/profiles/action.json":
				return []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_MAYBE"}]}`), nil
			case "/profiles/broken.json":
				return []byte(`{"defaultAction":`), nil
			}
			return nil, fs.ErrNotExist
		},
		Resolve: func(p string) (string, error) {
			switch p {
			case "/missing":
				return "", &fs.PathError{Op: "lstat", Path: p, Err: fs.ErrNotExist}
			case "/link":
				return "/target", nil
			}
			return p, nil
		},
		Propagation: func(p string) (bool, bool, error) { return p == "/shared", p == "/slave", nil },
		Devices: func(p string) ([]HostDevice, error) {
			fuse := HostDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, Mode: 0o666}
			switch p {
			case "/dev":
				return []HostDevice{fuse, {Path: "/dev/null", Type: "c", Major: 1, Minor: 3}, {Path: "/dev/ptmx", Type: "c", Major: 5, Minor: 2}, {Path: "/dev/sda", Type: "b", Major: 8, Mode: 0o660, GID: 6}}, nil
			case "/dev/fuse":
				return []HostDevice{fuse}, nil
			case "/dev/snd":
				return []HostDevice{{Path: "/dev/snd/seq", Type: "c", Major: 116, Minor: 1, Mode: 0o660, GID: 29}, {Path: "/dev/snd/by/pcm", Type: "c", Major: 116, Minor: 2, Mode: 0o660}}, nil
			case "/dev/empty":
				return nil, nil
			}
			return nil, fs.ErrNotExist
		},
		SELinuxLabels: func(o []string) (string, string, error) { return "proc:" + strings.Join(o, ","), "mount", nil },
	}
}

// input is a plain pod with one container on a cgroup v2 node.
func input() Input {
	return Input{
		ID: "c1", PodID: "p1",
		Pod: &model.PodConfig{Meta: model.PodMeta{Name: "web", UID: "u", Namespace: "default"}},
		Container: &model.ContainerConfig{
			Meta: model.ContainerMeta{Name: "app"}, Image: model.ImageSpec{Image: "sha256:abc"}, Args: []string{"-v"},
			Annotations: map[string]string{"run.oci.handler": "krun"},
			Security: model.Security{
				MaskedPaths: []string{"/proc/kcore", "/sys/firmware"}, ReadonlyPaths: []string{"/proc/sys"}, NoNewPrivs: true,
			},
		},
		Image: ocispec.ImageConfig{
			Entrypoint: []string{"/app"}, Cmd: []string{"serve"}, WorkingDir: "/srv", Env: []string{"A=image", "PATH=/app/bin", "SECRET", "PA*TH"},
			Labels: map[string]string{"run.oci.handler": "krun"},
		},
		Identity: model.Identity{UID: 1000, GID: 1001, Groups: []uint32{7, 1001}}, Home: "/home/web",
		CgroupPath: "/kubepods/podu/c1", Hostname: "web-0",
		HostsPath: "/run/p1/hosts", HostnamePath: "/run/p1/hostname", ResolvConfPath: "/run/p1/resolv.conf", Shm: "fd:shm",
		Namespaces: model.Namespaces{PID: model.NamespaceContainer},
		Policy:     Policy{PidsLimit: 4096, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 524288}}},
		Host: Host{
			CgroupV2: true, Seccomp: true, RecursiveReadonly: true, SwapController: true, MinOOMScoreAdj: -1000,
			Capabilities:  append(slices.Clone(defaultCapabilities), "CAP_NET_ADMIN", "CAP_SYS_ADMIN"),
			HugepageSizes: []string{"2MB"},
		},
		Node: node(),
	}
}

func TestGolden(t *testing.T) {
	for name, change := range map[string]func(*Input){
		"plain": func(*Input) {},
		"host-namespaces": func(in *Input) {
			in.Namespaces = model.Namespaces{Network: model.NamespaceNode, PID: model.NamespaceNode, IPC: model.NamespaceNode}
		},
		"user-namespace": func(in *Input) {
			u := &model.UserNamespace{UIDs: model.IDMapping{Host: 65536, Length: 65536}, GIDs: model.IDMapping{Host: 131072, Length: 65536}}
			in.Namespaces.User, in.Pod.Namespaces.User = u, u
			in.Container.Mounts = []model.Mount{
				{ContainerPath: "/plain", HostPath: "/plain"},
				{ContainerPath: "/mapped", HostPath: "/mapped", UIDMappings: []model.IDMapping{u.UIDs}, GIDMappings: []model.IDMapping{u.GIDs}},
				{ContainerPath: "/model", Image: "sha256:def", Readonly: true, UIDMappings: []model.IDMapping{u.UIDs}, GIDMappings: []model.IDMapping{u.GIDs}},
			}
			in.ImageVolumes = map[int]string{2: "image:2"}
		},
		"privileged": func(in *Input) {
			sec := &in.Container.Security
			sec.Privileged, sec.ReadonlyRootfs, in.Pod.Privileged = true, true, true
			sec.Seccomp = &model.Profile{Type: model.ProfileLocalhost, Ref: "/profiles/missing.json"} // ignored
			in.Container.Devices = []model.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "r"}}
		},
		"full": func(in *Input) {
			c := in.Container
			c.Command, c.Args = []string{"/bin/sh"}, []string{"-c", "id"}
			c.WorkingDir, c.TTY = "work/../w", true
			c.Env = []model.KeyValue{{Key: "A", Value: []byte("pod")}, {Key: "B", Value: []byte{}}, {Key: "B", Value: []byte("2=3")}}
			c.Mounts = []model.Mount{
				{ContainerPath: "/data/deep/er", HostPath: "/link", Readonly: true},
				{ContainerPath: "/data", HostPath: "/shared", Propagation: model.PropagationBidirectional},
				{ContainerPath: "etc/hosts", HostPath: "/pods/hosts"},
				{ContainerPath: "/var/run/x", HostPath: "/slave", Propagation: model.PropagationHostToContainer},
				{ContainerPath: "/rro", HostPath: "/r", Readonly: true, RecursiveReadonly: true},
				{ContainerPath: "/model", Image: "sha256:def", Readonly: true},
			}
			in.ImageVolumes = map[int]string{5: "/images/def/sub"}
			c.Devices = []model.Device{{HostPath: "/dev/snd", ContainerPath: "/dev/sound", Permissions: "rw"}}
			c.Security.Capabilities = model.Capabilities{Add: []string{"net_admin"}, Drop: []string{"ALL"}, AddAmbient: []string{"CAP_NET_BIND_SERVICE"}}
			c.Security.Seccomp = &model.Profile{Type: model.ProfileLocalhost, Ref: "/profiles/good.json"}
			c.Resources = model.Resources{
				CPUPeriod: 100000, CPUQuota: 50000, CPUShares: 512, MemoryLimit: 64 << 20, OOMScoreAdj: 900, CpusetCpus: "0-1",
				Hugepages: []model.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}, {PageSize: "2MB", Limit: 4 << 20}},
				Unified:   map[string]string{"memory.oom.group": "1"},
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := input()
			change(&in)
			before, _ := json.Marshal([]any{in.Pod, in.Container, in.Image})
			s, err := Build(in)
			if err != nil {
				t.Fatal(err)
			}
			if after, _ := json.Marshal([]any{in.Pod, in.Container, in.Image}); !bytes.Equal(before, after) {
				t.Error("the input was changed")
			}
			got, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			file := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("differs from %s (go test -update rewrites it); got:\n%s", file, got)
			}
		})
	}
}

// user gives the pod a user namespace of so many ids.
func user(in *Input, users, groups uint32) {
	in.Namespaces.User = &model.UserNamespace{UIDs: model.IDMapping{Host: 65536, Length: users}, GIDs: model.IDMapping{Host: 65536, Length: groups}}
}

// TestSmallUserNamespace: terminals have no group that the pod does not have.
func TestSmallUserNamespace(t *testing.T) {
	for groups, want := range map[uint32]bool{5: false, 6: true} {
		in := input()
		user(&in, 1, groups)
		in.Identity = model.Identity{}
		s, err := Build(in)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range s.Mounts {
			if m.Destination == "/dev/pts" && slices.Contains(m.Options, "gid=5") != want {
				t.Errorf("%d groups: %v", groups, m.Options)
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	c := func(f func(*model.ContainerConfig)) func(*Input) { return func(in *Input) { f(in.Container) } }
	sec := func(f func(*model.Security)) func(*Input) { return func(in *Input) { f(&in.Container.Security) } }
	mount := func(m model.Mount) func(*Input) {
		return c(func(c *model.ContainerConfig) { c.Mounts = []model.Mount{{ContainerPath: "/ok", HostPath: "/ok"}, m} })
	}
	dev := func(host, perm string) func(*Input) {
		return c(func(c *model.ContainerConfig) {
			c.Devices = []model.Device{{HostPath: host, ContainerPath: "/dev/x", Permissions: perm}}
		})
	}
	res := func(r model.Resources) func(*Input) {
		return c(func(c *model.ContainerConfig) { c.Resources = r })
	}
	profile := func(ref string) func(*Input) {
		return sec(func(s *model.Security) { s.Seccomp = &model.Profile{Type: model.ProfileLocalhost, Ref: ref} })
	}
	for name, r := range map[string]struct {
		change func(*Input)
		kind   func(error) bool
		text   string
	}{
		"no program":                {func(in *Input) { in.Image, in.Container.Args = ocispec.ImageConfig{}, nil }, errdefs.IsInvalidArgument, "command"},
		"empty program":             {c(func(c *model.ContainerConfig) { c.Command = []string{""} }), errdefs.IsInvalidArgument, "command"},
		"NUL in an argument":        {c(func(c *model.ContainerConfig) { c.Args = []string{"a\x00b"} }), errdefs.IsInvalidArgument, "argument 1"},
		"NUL in the directory":      {c(func(c *model.ContainerConfig) { c.WorkingDir = "/\x00" }), errdefs.IsInvalidArgument, "working_dir"},
		"env key":                   {c(func(c *model.ContainerConfig) { c.Env = []model.KeyValue{{Key: "A=B"}} }), errdefs.IsInvalidArgument, "envs[0].key"},
		"env value":                 {c(func(c *model.ContainerConfig) { c.Env = []model.KeyValue{{Key: "A", Value: []byte{0}}} }), errdefs.IsInvalidArgument, "envs[0]"},
		"privileged in a plain pod": {sec(func(s *model.Security) { s.Privileged = true }), errdefs.IsInvalidArgument, "security_context.privileged"},
		"network mode":              {func(in *Input) { in.Namespaces.Network = model.NamespaceContainer }, errdefs.IsInvalidArgument, "namespace_options.network"},
		"ipc mode":                  {func(in *Input) { in.Namespaces.IPC = model.NamespaceTarget }, errdefs.IsInvalidArgument, "namespace_options.ipc"},
		"pid mode":                  {func(in *Input) { in.Namespaces.PID = 9 }, errdefs.IsInvalidArgument, "namespace_options.pid"},
		"host pid in a user namespace": {func(in *Input) {
			user(in, 65536, 65536)
			in.Namespaces.PID = model.NamespaceNode
		}, errdefs.IsInvalidArgument, "namespace_options.pid"},
		"user beyond the mapping":  {func(in *Input) { user(in, 1000, 65536) }, errdefs.IsInvalidArgument, "run_as_user: user 1000 "},
		"group beyond the mapping": {func(in *Input) { user(in, 1001, 1001) }, errdefs.IsInvalidArgument, "group 1001 "},
		"image with other ids": {func(in *Input) {
			user(in, 65536, 65536)
			other := []model.IDMapping{{Host: 5, Length: 65536}}
			in.Container.Mounts = []model.Mount{{ContainerPath: "/m", Image: "i", Readonly: true, UIDMappings: other, GIDMappings: other}}
		}, errdefs.IsInvalidArgument, "mounts[0].uidMappings"},
		"missing host path":  {mount(model.Mount{ContainerPath: "/m", HostPath: "/missing"}), errdefs.IsInvalidArgument, "mounts[1].host_path"},
		"relative host path": {mount(model.Mount{ContainerPath: "/m", HostPath: "m"}), errdefs.IsInvalidArgument, "mounts[1].host_path"},
		"mount on the root":  {mount(model.Mount{ContainerPath: "/a/..", HostPath: "/x"}), errdefs.IsInvalidArgument, "mounts[1].container_path"},
		"rro not readonly":   {mount(model.Mount{ContainerPath: "/m", HostPath: "/x", RecursiveReadonly: true}), errdefs.IsInvalidArgument, "recursive_read_only"},
		"rro propagated":     {mount(model.Mount{ContainerPath: "/m", HostPath: "/shared", RecursiveReadonly: true, Readonly: true, Propagation: 1}), errdefs.IsInvalidArgument, "recursive_read_only"},
		"rro on an old kernel": {func(in *Input) {
			in.Host.RecursiveReadonly = false
			mount(model.Mount{ContainerPath: "/m", HostPath: "/x", RecursiveReadonly: true, Readonly: true})(in)
		}, func(err error) bool { return strings.HasPrefix(err.Error(), "RROUnsupported") }, "mounts[1]"},
		"rslave on private":   {mount(model.Mount{ContainerPath: "/m", HostPath: "/x", Propagation: 1}), errdefs.IsFailedPrecondition, "mounts[1].propagation"},
		"rshared on slave":    {mount(model.Mount{ContainerPath: "/m", HostPath: "/slave", Propagation: 2}), errdefs.IsFailedPrecondition, "mounts[1].propagation"},
		"unknown propagation": {mount(model.Mount{ContainerPath: "/m", HostPath: "/x", Propagation: 3}), errdefs.IsInvalidArgument, "mounts[1].propagation"},
		"writable image":      {mount(model.Mount{ContainerPath: "/m", Image: "i"}), errdefs.IsInvalidArgument, "mounts[1].readonly"},
		"image and host path": {mount(model.Mount{ContainerPath: "/m", Image: "i", HostPath: "/x", Readonly: true}), errdefs.IsInvalidArgument, "mounts[1]"},
		"image not mounted":   {mount(model.Mount{ContainerPath: "/m", Image: "i", Readonly: true}), func(err error) bool { return strings.HasPrefix(err.Error(), "ImageVolumeMountFailed: ") }, "mounts[1]"},
		"permissions empty":   {dev("/dev/fuse", ""), errdefs.IsInvalidArgument, "devices[0].permissions"},
		"permissions unknown": {dev("/dev/fuse", "rx"), errdefs.IsInvalidArgument, "devices[0].permissions"},
		"permissions twice":   {dev("/dev/fuse", "rr"), errdefs.IsInvalidArgument, "devices[0].permissions"},
		"missing device":      {dev("/dev/none", "r"), errdefs.IsInvalidArgument, "devices[0].host_path"},
		"empty directory":     {dev("/dev/empty", "r"), errdefs.IsInvalidArgument, "devices[0].host_path"},
		"unknown capability":  {sec(func(s *model.Security) { s.Capabilities.Add = []string{"FLY"} }), errdefs.IsInvalidArgument, "add_capabilities[0]"},
		"unknown drop":        {sec(func(s *model.Security) { s.Capabilities.Drop = []string{"CAP_FLY"} }), errdefs.IsInvalidArgument, "drop_capabilities[0]"},
		"unavailable":         {sec(func(s *model.Security) { s.Capabilities.Add = []string{"SYS_RESOURCE"} }), errdefs.IsFailedPrecondition, "CAP_SYS_RESOURCE"},
		"masked path":         {sec(func(s *model.Security) { s.MaskedPaths = []string{"proc"} }), errdefs.IsInvalidArgument, "masked_paths[0]"},
		"profile empty":       {profile(""), errdefs.IsInvalidArgument, "seccomp.localhost_ref"},
		"profile relative":    {profile("good.json"), errdefs.IsInvalidArgument, "seccomp.localhost_ref"},
		"profile missing":     {profile("/profiles/none.json"), errdefs.IsInvalidArgument, "seccomp.localhost_ref"},
		"profile malformed":   {profile("/profiles/broken.json"), errdefs.IsInvalidArgument, "seccomp.localhost_ref"},
		"profile of nothing":  {profile("/profiles/empty.json"), errdefs.IsInvalidArgument, "defaultAction"},
		"profile action":      {profile("/profiles/action.json"), errdefs.IsInvalidArgument, "SCMP_ACT_MAYBE"},
		"reference unused":    {sec(func(s *model.Security) { s.Seccomp = &model.Profile{Ref: "/x"} }), errdefs.IsInvalidArgument, "seccomp.localhost_ref"},
		"no seccomp":          {func(in *Input) { in.Host.Seccomp = false; in.Container.Security.Seccomp = &model.Profile{} }, errdefs.IsFailedPrecondition, "seccomp"},
		"no apparmor":         {sec(func(s *model.Security) { s.AppArmor = &model.Profile{Type: model.ProfileLocalhost, Ref: "p"} }), errdefs.IsFailedPrecondition, "apparmor"},
		"apparmor unloaded":   {func(in *Input) { in.Host.AppArmor = true; in.Container.Security.AppArmor = &model.Profile{} }, errdefs.IsFailedPrecondition, "apparmor"},
		"selinux role":        {sec(func(s *model.Security) { s.SELinux = &model.SELinux{Role: "bad:role"} }), errdefs.IsInvalidArgument, "selinux_options.role"},
		"selinux level":       {sec(func(s *model.Security) { s.SELinux = &model.SELinux{Level: "high"} }), errdefs.IsInvalidArgument, "selinux_options.level"},
		"swap below memory":   {res(model.Resources{MemoryLimit: 10, SwapLimit: 5}), errdefs.IsInvalidArgument, "memory_swap_limit"},
		"quota":               {res(model.Resources{CPUQuota: -2}), errdefs.IsInvalidArgument, "cpu_quota"},
		"cpuset":              {res(model.Resources{CpusetCpus: "0;1"}), errdefs.IsInvalidArgument, "cpuset_cpus"},
		"oom score":           {res(model.Resources{OOMScoreAdj: 1001}), errdefs.IsInvalidArgument, "oom_score_adj"},
		"huge page size":      {res(model.Resources{Hugepages: []model.HugepageLimit{{PageSize: "big"}}}), errdefs.IsInvalidArgument, "hugepage_limits[0]"},
		"huge pages missing":  {res(model.Resources{Hugepages: []model.HugepageLimit{{PageSize: "1GB", Limit: 1}}}), errdefs.IsFailedPrecondition, "hugepage_limits[0]"},
		"unified core file":   {res(model.Resources{Unified: map[string]string{"cgroup.procs": "1"}}), errdefs.IsInvalidArgument, "unified"},
		"unified path":        {res(model.Resources{Unified: map[string]string{"memory.max/../../x": "1"}}), errdefs.IsInvalidArgument, "unified"},
		"unified on v1": {func(in *Input) {
			in.Host.CgroupV2 = false
			in.Container.Resources.Unified = map[string]string{"memory.max": "1"}
		}, errdefs.IsInvalidArgument, "unified"},
	} {
		in := input()
		r.change(&in)
		_, err := Build(in)
		if err == nil || !r.kind(err) || !strings.Contains(err.Error(), r.text) {
			t.Errorf("%s: got %v, want an error of its kind naming %q", name, err, r.text)
		}
	}
}

func TestCapabilitySets(t *testing.T) {
	bounding := append(slices.Clone(defaultCapabilities), "CAP_NET_ADMIN", "CAP_SYS_ADMIN")
	less := slices.DeleteFunc(slices.Clone(bounding), func(c string) bool { return c == "CAP_CHOWN" })
	slices.Sort(less)
	for name, c := range map[string]struct {
		caps model.Capabilities
		want []string
	}{
		"drop all":              {model.Capabilities{Drop: []string{"all"}}, nil},
		"drop all, add":         {model.Capabilities{Drop: []string{"ALL"}, Add: []string{"CHOWN", "cap_kill"}}, []string{"CAP_CHOWN", "CAP_KILL"}},
		"add all, drop":         {model.Capabilities{Add: []string{"ALL"}, Drop: []string{"CHOWN"}}, less},
		"add and drop":          {model.Capabilities{Drop: []string{"ALL", "CHOWN"}, Add: []string{"CHOWN"}}, nil},
		"default":               {model.Capabilities{}, defaultCapabilities},
		"ambient joins the set": {model.Capabilities{Drop: []string{"ALL"}, AddAmbient: []string{"KILL"}}, []string{"CAP_KILL"}},
	} {
		got, err := capabilities(model.Security{Capabilities: c.caps}, bounding)
		if err != nil || !reflect.DeepEqual(got.Bounding, c.want) || !reflect.DeepEqual(got.Effective, c.want) || !reflect.DeepEqual(got.Permitted, c.want) {
			t.Errorf("%s: got %+v, %v; want %v", name, got, err, c.want)
			continue
		}
		if len(c.caps.AddAmbient) == 0 && (got.Ambient != nil || got.Inheritable != nil) {
			t.Errorf("%s: ambient %v, inheritable %v; want none", name, got.Ambient, got.Inheritable)
		}
	}
	got, err := capabilities(model.Security{}, []string{"CAP_CHOWN"})
	if err != nil || !reflect.DeepEqual(got.Bounding, []string{"CAP_CHOWN"}) {
		t.Errorf("small bounding set: got %+v, %v", got, err)
	}
}

func TestDefaultSeccomp(t *testing.T) {
	build := func(add ...string) *specs.Spec {
		in := input()
		in.Container.Security.Seccomp = &model.Profile{Type: model.ProfileRuntimeDefault}
		in.Container.Security.Capabilities.Add = add
		s, err := Build(in)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	allows := func(s *specs.Spec, call string) bool {
		for _, c := range s.Linux.Seccomp.Syscalls {
			if c.Action == specs.ActAllow && len(c.Args) == 0 && slices.Contains(c.Names, call) {
				return true
			}
		}
		return false
	}
	plain, admin := build(), build("SYS_ADMIN")
	if plain.Linux.Seccomp.DefaultAction != specs.ActErrno || allows(plain, "mount") || !allows(admin, "mount") || allows(plain, "unshare") {
		t.Error("the default profile does not follow the capabilities")
	}
	for _, c := range plain.Linux.Seccomp.Syscalls {
		if c.Action == specs.ActAllow && slices.Contains(c.Names, "socket") && len(c.Args) == 0 {
			t.Error("socket is allowed for every family: AF_ALG and AF_VSOCK must not be")
		}
	}
	again := build()
	if !reflect.DeepEqual(plain.Linux.Seccomp, again.Linux.Seccomp) {
		t.Error("the cached profile differs")
	}
	again.Linux.Seccomp.Syscalls[0].Names[0] = "changed"
	if reflect.DeepEqual(build().Linux.Seccomp, again.Linux.Seccomp) {
		t.Error("two specs share one profile")
	}
}

func TestRawEnvironment(t *testing.T) {
	in := input()
	in.Container.Env = []model.KeyValue{{Key: "RAW", Value: []byte{0xff, 0xfe, '\n'}}, {Key: "HOME", Value: []byte("/h")}, {Key: "HOSTNAME", Value: []byte("mine")}}
	s, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"A=image", "PATH=/app/bin", "RAW=\xff\xfe\n", "HOME=/h", "HOSTNAME=mine"}
	if !reflect.DeepEqual(s.Process.Env, want) {
		t.Errorf("got %q, want %q", s.Process.Env, want)
	}
}

func TestLabels(t *testing.T) {
	in := input()
	in.Host.AppArmor, in.Host.AppArmorDefault, in.Host.SELinux = true, true, true
	in.Pod.SELinux = &model.SELinux{Type: "t", Level: "s0:c1,c2"}
	s, err := Build(in)
	if err != nil || s.Process.ApparmorProfile != DefaultAppArmorProfile || s.Process.SelinuxLabel != "proc:type:t,level:s0:c1,c2" || s.Linux.MountLabel != "mount" {
		t.Errorf("got %q, %q, %v", s.Process.ApparmorProfile, s.Process.SelinuxLabel, err)
	}
	in.Container.Security.Privileged, in.Pod.Privileged = true, true
	if s, err = Build(in); err != nil || s.Process.ApparmorProfile != "" || s.Process.SelinuxLabel != "" {
		t.Errorf("privileged: got %q, %q, %v", s.Process.ApparmorProfile, s.Process.SelinuxLabel, err)
	}
}

func TestUpdateResources(t *testing.T) {
	h := input().Host
	get := func(up, cur model.Resources) string {
		t.Helper()
		r, err := UpdateResources(up, cur, Policy{}, h)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := json.Marshal(r)
		return string(b)
	}
	for name, c := range map[string]struct {
		up, cur model.Resources
		want    string
	}{
		"nothing":           {want: `{}`},
		"cpuset only":       {up: model.Resources{CpusetCpus: "1"}, cur: model.Resources{MemoryLimit: 9}, want: `{"cpu":{"cpus":"1"}}`},
		"unlimited quota":   {up: model.Resources{CPUQuota: -1}, want: `{"cpu":{"quota":-1}}`},
		"memory":            {up: model.Resources{MemoryLimit: 8}, want: `{"memory":{"limit":8,"swap":8}}`},
		"own swap limit":    {up: model.Resources{MemoryLimit: 8}, cur: model.Resources{SwapLimit: 16}, want: `{"memory":{"limit":8}}`},
		"unified swap":      {up: model.Resources{MemoryLimit: 8}, cur: model.Resources{Unified: map[string]string{"memory.swap.max": "0"}}, want: `{"memory":{"limit":8}}`},
		"oom score is kept": {up: model.Resources{OOMScoreAdj: 5}, want: `{}`},
	} {
		if got := get(c.up, c.cur); got != c.want {
			t.Errorf("%s: got %s, want %s", name, got, c.want)
		}
	}
	h.SwapController = false
	if got := get(model.Resources{MemoryLimit: 8, SwapLimit: 9}, model.Resources{}); got != `{"memory":{"limit":8}}` {
		t.Errorf("no swap controller: got %s", got)
	}
}

func BenchmarkBuild(b *testing.B) {
	in := input()
	in.Container.Security.Seccomp = &model.Profile{Type: model.ProfileRuntimeDefault}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Build(in); err != nil {
			b.Fatal(err)
		}
	}
}
