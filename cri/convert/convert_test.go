package convert

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox"
)

func pod(change func(*runtimeapi.PodSandboxConfig)) *runtimeapi.PodSandboxConfig {
	c := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web-0", Namespace: "default", Uid: "u", Attempt: 3},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{}}},
	}
	if change != nil {
		change(c)
	}
	return c
}

func container(change func(*runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
		Image:    &runtimeapi.ImageSpec{Image: "sha256:1"},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{}}},
	}
	if change != nil {
		change(c)
	}
	return c
}

// wantField checks that err is InvalidArgument and about field; "" wants none.
func wantField(t *testing.T, err error, field string) {
	t.Helper()
	if field == "" {
		if err != nil {
			t.Errorf("unexpected %v", err)
		}
		return
	}
	var f *FieldError
	if !errors.As(err, &f) || !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v, want a field error about %s", err, field)
		return
	}
	if !strings.HasSuffix(f.Field, field) {
		t.Errorf("error is about %s, want %s", f.Field, field)
	}
}

func TestPodErrors(t *testing.T) {
	type P = *runtimeapi.PodSandboxConfig
	ns := func(c P) *runtimeapi.NamespaceOption { return c.Linux.SecurityContext.NamespaceOptions }
	line := []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}}
	for _, tt := range []struct {
		name, field string
		change      func(P)
	}{
		{"plain", "", nil},
		{"no linux part", "", func(c P) { c.Linux = nil }},
		{"no security context", "", func(c P) { c.Linux.SecurityContext = nil }},
		{"no metadata", "config.metadata", func(c P) { c.Metadata = nil }},
		{"no name", "metadata.name", func(c P) { c.Metadata.Name = "" }},
		{"no uid", "metadata.uid", func(c P) { c.Metadata.Uid = "" }},
		{"no namespace", "metadata.namespace", func(c P) { c.Metadata.Namespace = "" }},
		{"long hostname", "hostname", func(c P) { c.Hostname = strings.Repeat("h", 65) }},
		{"relative log directory", "log_directory", func(c P) { c.LogDirectory = "logs" }},
		{"host namespaces", "", func(c P) { *ns(c) = runtimeapi.NamespaceOption{Network: 2, Pid: 2, Ipc: 2} }},
		{"container pid", "", func(c P) { ns(c).Pid = runtimeapi.NamespaceMode_CONTAINER }},
		{"container network", ".network", func(c P) { ns(c).Network = runtimeapi.NamespaceMode_CONTAINER }},
		{"target network", ".network", func(c P) { ns(c).Network = runtimeapi.NamespaceMode_TARGET }},
		{"container ipc", ".ipc", func(c P) { ns(c).Ipc = runtimeapi.NamespaceMode_CONTAINER }},
		{"target ipc", ".ipc", func(c P) { ns(c).Ipc = runtimeapi.NamespaceMode_TARGET }},
		{"target pid", ".pid", func(c P) { ns(c).Pid = runtimeapi.NamespaceMode_TARGET }},
		{"unknown pid", ".pid", func(c P) { ns(c).Pid = 9 }},
		{"userns of the host", "", func(c P) { ns(c).UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE} }},
		{"userns of the host with ids", "userns_options", func(c P) {
			ns(c).UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE, Uids: line}
		}},
		{"userns of the pod", "", func(c P) {
			ns(c).UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: line, Gids: line}
		}},
		{"userns without ids", "userns_options.uids", func(c P) { ns(c).UsernsOptions = &runtimeapi.UserNamespace{} }},
		{"userns without groups", "userns_options.gids", func(c P) { ns(c).UsernsOptions = &runtimeapi.UserNamespace{Uids: line} }},
		{"two lines", "userns_options.uids", func(c P) {
			ns(c).UsernsOptions = &runtimeapi.UserNamespace{Uids: append(line, line...), Gids: line}
		}},
		{"no root", "userns_options.gids[0].container_id", func(c P) {
			ns(c).UsernsOptions = &runtimeapi.UserNamespace{Uids: line, Gids: []*runtimeapi.IDMapping{{ContainerId: 1, HostId: 65536, Length: 65536}}}
		}},
		{"no ids", "userns_options.uids[0].length", func(c P) {
			ns(c).UsernsOptions = &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{HostId: 65536}}, Gids: line}
		}},
		{"beyond the last id", "userns_options.uids[0]", func(c P) {
			ns(c).UsernsOptions = &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{HostId: 1 << 31, Length: 1 << 31}}, Gids: line}
		}},
		{"userns mode unknown", "userns_options.mode", func(c P) {
			ns(c).UsernsOptions = &runtimeapi.UserNamespace{Mode: 9, Uids: line, Gids: line}
		}},
		{"userns of the container", "userns_options.mode", func(c P) { ns(c).UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_CONTAINER} }},
		{"userns of a target", "userns_options.mode", func(c P) { ns(c).UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_TARGET} }},
		{"group without user", "run_as_group", func(c P) { c.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 1} }},
		{"negative user", "run_as_user", func(c P) { c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: -1} }},
		{"the last id", "run_as_user", func(c P) { c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1<<32 - 1} }},
		{"seccomp path not absolute", "seccomp.localhost_ref", func(c P) {
			c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "p.json"}
		}},
		{"protocol", "port_mappings[0].protocol", func(c P) { c.PortMappings = []*runtimeapi.PortMapping{{Protocol: 9}} }},
		{"port", "port_mappings[0].host_port", func(c P) { c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 1, HostPort: 70000}} }},
		{"host ip", "port_mappings[0].host_ip", func(c P) { c.PortMappings = []*runtimeapi.PortMapping{{HostIp: "localhost"}} }},
		{"no container port", "port_mappings[0].container_port", func(c P) { c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 80}} }},
		{"sysctl that leaves", "sysctls", func(c P) { c.Linux.Sysctls = map[string]string{"net/../../x": "1"} }},
		{"quota", "resources.cpu_quota", func(c P) { c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuQuota: -2} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := PodConfig(pod(tt.change), "")
			wantField(t, err, tt.field)
		})
	}
	_, err := PodConfig(nil, "")
	wantField(t, err, "config")
}

func TestPodValues(t *testing.T) {
	c, err := PodConfig(pod(func(c *runtimeapi.PodSandboxConfig) {
		c.DnsConfig = &runtimeapi.DNSConfig{}
		c.Annotations = map[string]string{"a": "b"}
		c.Linux.Sysctls = map[string]string{"net/ipv4/conf/eth0.100/rp_filter": "1", "kernel.shm_rmid_forced": "1"}
		c.PortMappings = []*runtimeapi.PortMapping{
			{ContainerPort: 53, HostPort: 5353, Protocol: runtimeapi.Protocol_UDP, HostIp: "::ffff:127.0.0.1"},
			{ContainerPort: 80, HostPort: 8080, HostIp: "0.0.0.0"},
		}
		//lint:ignore SA1019 the fall-back
		c.Linux.SecurityContext.SeccompProfilePath = "localhost//p.json"
	}), "h")
	if err != nil {
		t.Fatal(err)
	}
	if c.Meta != (sandbox.PodMeta{Name: "web-0", UID: "u", Namespace: "default", Attempt: 3}) || c.Handler != "h" || c.Hostname != "web-0" {
		t.Errorf("got %+v", c)
	}
	if c.DNS == nil { // empty is not the same as the host's
		t.Error("an empty dns_config must stay")
	}
	if want := map[string]string{"net.ipv4.conf.eth0/100.rp_filter": "1", "kernel.shm_rmid_forced": "1"}; !reflect.DeepEqual(c.Sysctls, want) {
		t.Errorf("sysctls %v, want %v", c.Sysctls, want)
	}
	if p := c.PortMappings; p[0].Protocol != cni.UDP || p[0].HostIP.String() != "127.0.0.1" || p[1].HostIP.IsValid() {
		t.Errorf("ports %v", p)
	}
	if c.Seccomp == nil || c.Seccomp.Type != sandbox.ProfileLocalhost || c.Seccomp.Ref != "/p.json" {
		t.Errorf("seccomp %v", c.Seccomp)
	}
	if c.AppArmor != nil {
		t.Errorf("apparmor %v", c.AppArmor)
	}
}

// TestUserNamespaceEcho: statuses give a user namespace and a mount's mappings back
// as they were asked for, and none where there was none.
func TestUserNamespaceEcho(t *testing.T) {
	want := &runtimeapi.UserNamespace{
		Mode: runtimeapi.NamespaceMode_POD,
		Uids: []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}}, Gids: []*runtimeapi.IDMapping{{HostId: 131072, Length: 1000}},
	}
	for _, u := range []*runtimeapi.UserNamespace{nil, want} {
		c, err := PodConfig(pod(func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u }), "")
		if err != nil {
			t.Fatal(err)
		}
		if got := PodStatus(&sandbox.PodStatus{Config: c}).Linux.Namespaces.Options.UsernsOptions; !proto.Equal(got, u) {
			t.Errorf("echo %v, want %v", got, u)
		}
	}
	m := &runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: want.Uids, GidMappings: want.Gids}
	v, err := mount("m", m)
	if err != nil {
		t.Fatal(err)
	}
	if got := mountProto(&v); !proto.Equal(got, m) {
		t.Errorf("echo %v, want %v", got, m)
	}
}

func TestContainerErrors(t *testing.T) {
	type C = *runtimeapi.ContainerConfig
	sec := func(c C) *runtimeapi.LinuxContainerSecurityContext { return c.Linux.SecurityContext }
	mnt := func(m *runtimeapi.Mount) func(C) {
		return func(c C) { c.Mounts = []*runtimeapi.Mount{m} }
	}
	for _, tt := range []struct {
		name, field string
		change      func(C)
	}{
		{"plain", "", nil},
		{"no linux part", "", func(c C) { c.Linux = nil }},
		{"no name", "metadata.name", func(c C) { c.Metadata = nil }},
		{"no image", "image.image", func(c C) { c.Image = nil }},
		{"log path", "log_path", func(c C) { c.LogPath = "../../etc/shadow" }},
		{"absolute log path", "log_path", func(c C) { c.LogPath = "/etc/shadow" }},
		{"working dir", "working_dir", func(c C) { c.WorkingDir = "tmp" }},
		{"env without a name", "envs[0].key", func(c C) { c.Envs = []*runtimeapi.KeyValue{{Value: []byte("x")}} }},
		{"env name", "envs[0].key", func(c C) { c.Envs = []*runtimeapi.KeyValue{{Key: "A=B"}} }},
		{"env value with NUL", "envs[0].value", func(c C) { c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0}}} }},
		{"signal", "stop_signal", func(c C) { c.StopSignal = 99 }},
		{"cdi", "CDI_devices[0].name", func(c C) { c.CDIDevices = []*runtimeapi.CDIDevice{{}} }},
		{"device permissions", "devices[0].permissions", func(c C) { c.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", Permissions: "x"}} }},
		{"no device permissions", "devices[0].permissions", func(c C) { c.Devices = []*runtimeapi.Device{{HostPath: "/dev/null"}} }},
		{"no mount source", "mounts[0].host_path", mnt(&runtimeapi.Mount{ContainerPath: "/a"})},
		{"no mount target", "mounts[0].container_path", mnt(&runtimeapi.Mount{HostPath: "/a"})},
		{"two sources", "mounts[0].host_path", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", Image: &runtimeapi.ImageSpec{Image: "i"}})},
		{"writable image", "mounts[0].readonly", mnt(&runtimeapi.Mount{ContainerPath: "/a", Image: &runtimeapi.ImageSpec{Image: "i"}})},
		{"recursive but writable", "recursive_read_only", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", RecursiveReadOnly: true})},
		{"recursive with propagation", "recursive_read_only", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", RecursiveReadOnly: true, Readonly: true, Propagation: 1})},
		{"recursive", "", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", RecursiveReadOnly: true, Readonly: true})},
		{"propagation", "propagation", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", Propagation: 7})},
		{"mappings of users alone", "uidMappings", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: []*runtimeapi.IDMapping{{Length: 1}}})},
		{"mappings", "", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: []*runtimeapi.IDMapping{{Length: 1}}, GidMappings: []*runtimeapi.IDMapping{{Length: 1}}})},
		{"mapping of nothing", "gidMappings[0].length", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: []*runtimeapi.IDMapping{{Length: 1}}, GidMappings: []*runtimeapi.IDMapping{{}}})},
		{"options", "mount_options", mnt(&runtimeapi.Mount{ContainerPath: "/a", HostPath: "/b", MountOptions: []string{"noexec"}})},
		{"user twice", "run_as_username", func(c C) { sec(c).RunAsUser = &runtimeapi.Int64Value{}; sec(c).RunAsUsername = "n" }},
		{"group without user", "run_as_group", func(c C) { sec(c).RunAsGroup = &runtimeapi.Int64Value{Value: 5} }},
		{"group with user name", "", func(c C) { sec(c).RunAsGroup = &runtimeapi.Int64Value{Value: 5}; sec(c).RunAsUsername = "n" }},
		{"supplemental group", "supplemental_groups", func(c C) { sec(c).SupplementalGroups = []int64{-5} }},
		{"policy", "supplemental_groups_policy", func(c C) { sec(c).SupplementalGroupsPolicy = 5 }},
		{"target without id", "target_id", func(c C) { sec(c).NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET }},
		{"target", "", func(c C) {
			sec(c).NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "x"}
		}},
		{"reference without Localhost", "seccomp.localhost_ref", func(c C) { sec(c).Seccomp = &runtimeapi.SecurityProfile{LocalhostRef: "/p"} }},
		{"Localhost without reference", "apparmor.localhost_ref", func(c C) { sec(c).Apparmor = &runtimeapi.SecurityProfile{ProfileType: 2} }},
		{"profile type", "seccomp.profile_type", func(c C) { sec(c).Seccomp = &runtimeapi.SecurityProfile{ProfileType: 7} }},
		//lint:ignore SA1019 the fall-back
		{"old apparmor string", "apparmor", func(c C) { sec(c).ApparmorProfile = "strange" }},
		{"oom score", "oom_score_adj", func(c C) { c.Linux.Resources = &runtimeapi.LinuxContainerResources{OomScoreAdj: 1001} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ContainerConfig(container(tt.change))
			wantField(t, err, tt.field)
		})
	}
}

func TestProfiles(t *testing.T) {
	local := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "new"}
	for _, tt := range []struct {
		name   string
		p      *runtimeapi.SecurityProfile
		legacy string
		want   *sandbox.Profile
	}{
		{"none is unconfined", nil, "", nil},
		{"empty message is the default", &runtimeapi.SecurityProfile{}, "", &sandbox.Profile{}},
		{"old default", nil, "runtime/default", &sandbox.Profile{}},
		{"old docker default", nil, "docker/default", &sandbox.Profile{}},
		{"old unconfined", nil, "unconfined", &sandbox.Profile{Type: sandbox.ProfileUnconfined}},
		{"old localhost", nil, "localhost/p", &sandbox.Profile{Type: sandbox.ProfileLocalhost, Ref: "p"}},
		{"the new one wins", local, "localhost/old", &sandbox.Profile{Type: sandbox.ProfileLocalhost, Ref: "new"}},
	} {
		got, err := profile("f", tt.p, tt.legacy, false)
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %v, %v, want %v", tt.name, got, err, tt.want)
		}
	}
}

// CRI's enum is alphabetical: each value must come back through the name.
func TestSignals(t *testing.T) {
	for n, name := range runtimeapi.Signal_name {
		got, err := signalName("f", runtimeapi.Signal(n))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n != 0 && signalEnum(got) != runtimeapi.Signal(n) {
			t.Errorf("%s becomes %q and then %s", name, got, signalEnum(got))
		}
	}
	for in, want := range map[string]runtimeapi.Signal{
		"":            runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT,
		"15":          runtimeapi.Signal_SIGNAL_SIGTERM,
		"term":        runtimeapi.Signal_SIGNAL_SIGTERM,
		"SIGQUIT":     runtimeapi.Signal_SIGNAL_SIGQUIT,
		"37":          runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3,
		"34":          runtimeapi.Signal_SIGNAL_SIGRTMIN,
		"64":          runtimeapi.Signal_SIGNAL_SIGRTMAX,
		"SIGRTMIN+3":  runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3,
		"RTMAX-14":    runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS14,
		"SIGNONSENSE": runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT,
		"900":         runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT,
	} {
		if got := signalEnum(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestResourcesComeBackAsSent(t *testing.T) {
	in := &runtimeapi.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: -1, CpuShares: 2, MemoryLimitInBytes: 1 << 30, OomScoreAdj: -998, CpusetCpus: "0-1", CpusetMems: "0",
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4}}, Unified: map[string]string{"memory.high": "max"},
		MemorySwapLimitInBytes: 1 << 31,
	}
	r, err := Resources("f", in)
	if err != nil {
		t.Fatal(err)
	}
	if got := ResourcesProto(r); !reflect.DeepEqual(got, in) {
		t.Errorf("got %v, want %v", got, in)
	}
	if r, err := Resources("f", nil); r != nil || err != nil {
		t.Errorf("nil became %v, %v", r, err)
	}
}

func TestContainerStatus(t *testing.T) {
	mounts := []*runtimeapi.Mount{
		{ContainerPath: "/a", HostPath: "/b/../c", Readonly: true, RecursiveReadOnly: true, SelinuxRelabel: true},
		{ContainerPath: "/d", HostPath: "/e", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		{ContainerPath: "/i", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "sha256:2", ImageRef: "r", UserSpecifiedImage: "u"}, ImageSubPath: "s"},
	}
	c, err := ContainerConfig(container(func(c *runtimeapi.ContainerConfig) {
		c.Mounts = mounts
		c.Annotations = map[string]string{"k": "v"}
		c.Image.UserSpecifiedImage = "busybox:1.36"
		c.Envs = []*runtimeapi.KeyValue{{Key: "RAW", Value: []byte{0xff, '='}}}
	}))
	if err != nil {
		t.Fatal(err)
	}
	if string(c.Env[0].Value) != "\xff=" {
		t.Errorf("environment values are raw bytes, got %q", c.Env[0].Value)
	}
	s := &sandbox.ContainerStatus{
		ID: id.NewContainer(), Pod: id.NewPod(), Config: c, State: sandbox.ContainerExited, CreatedAt: time.Unix(1, 5), StartedAt: time.Unix(2, 0),
		FinishedAt: time.Unix(3, 0), ExitCode: 137, Reason: "OOMKilled", ImageID: "sha256:1", ImageRef: "sha256:1", ImageName: "docker.io/library/busybox:1.36",
		LogPath: "/l/0.log", Identity: sandbox.Identity{UID: 1, GID: 2, Groups: []uint32{2, 3}}, StopSignal: "SIGQUIT",
	}
	got := ContainerStatus(s)
	if !reflect.DeepEqual(got.Mounts, mounts) {
		t.Errorf("mounts %v, want %v", got.Mounts, mounts)
	}
	if got.CreatedAt != 1_000_000_005 || got.State != runtimeapi.ContainerState_CONTAINER_EXITED || got.StopSignal != runtimeapi.Signal_SIGNAL_SIGQUIT ||
		got.Image.Image != "docker.io/library/busybox:1.36" || got.Image.UserSpecifiedImage != "busybox:1.36" || got.ImageId != "sha256:1" || got.ImageRef != "sha256:1" {
		t.Errorf("got %v", got)
	}
	if u := got.User.Linux; u.Uid != 1 || u.Gid != 2 || !reflect.DeepEqual(u.SupplementalGroups, []int64{2, 3}) {
		t.Errorf("user %v", u)
	}
	s.StartedAt, s.FinishedAt = time.Time{}, time.Time{}
	if got := ContainerStatus(s); got.StartedAt != 0 || got.FinishedAt != 0 {
		t.Error("times that have not come are 0")
	}
	if item := ContainerItem(s); item.ImageId != "sha256:1" || item.Image == nil || item.Metadata.Name != "c" {
		t.Errorf("item %v", item)
	}
}

func TestPodStatus(t *testing.T) {
	c, err := PodConfig(pod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	}), "h")
	if err != nil {
		t.Fatal(err)
	}
	p := PodStatus(&sandbox.PodStatus{ID: id.NewPod(), Config: c, State: sandbox.PodNotReady, CreatedAt: time.Unix(1, 0)})
	if p.Network.Ip != "" || p.Linux.Namespaces.Options.Network != runtimeapi.NamespaceMode_NODE || p.RuntimeHandler != "h" ||
		p.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || p.Metadata.Attempt != 3 {
		t.Errorf("got %v", p)
	}
}

func TestImageUser(t *testing.T) {
	for _, tt := range []struct {
		user string
		uid  int64 // -1: none
		name string
	}{
		{"", -1, ""}, {"0", 0, ""}, {"1000", 1000, ""}, {"1000:50", 1000, ""}, {"www", -1, "www"}, {"www:www", -1, "www"}, {":50", -1, ""},
	} {
		uid, name := imageUser(tt.user)
		got := int64(-1)
		if uid != nil {
			got = uid.Value
		}
		if got != tt.uid || name != tt.name {
			t.Errorf("%q: %d %q, want %d %q", tt.user, got, name, tt.uid, tt.name)
		}
	}
	if i := Image(&imageservice.Image{ID: digest.FromString("x")}); i.Size == 0 {
		t.Error("size 0 makes the kubelet reject the image")
	}
}

func TestAuth(t *testing.T) {
	if Auth(nil) != nil || Auth(&runtimeapi.AuthConfig{ServerAddress: "r"}) != nil {
		t.Error("no credentials must be anonymous")
	}
	in := &runtimeapi.AuthConfig{Username: "u", Password: "p", Auth: "a", ServerAddress: "s", IdentityToken: "i", RegistryToken: "r"}
	if got := Auth(in); *got != (imageservice.Auth{Username: "u", Password: "p", Auth: "a", IdentityToken: "i", RegistryToken: "r", Server: "s"}) {
		t.Error("credentials got lost")
	}
}

func TestStatsLeaveOutWhatIsUnknown(t *testing.T) {
	c, err := ContainerConfig(container(nil))
	if err != nil {
		t.Fatal(err)
	}
	s := &sandbox.ContainerStats{Container: &sandbox.ContainerStatus{Config: c}, Stats: sandbox.Stats{At: time.Unix(1, 0)}}
	got := ContainerStats(s)
	if got.Memory.AvailableBytes != nil || got.Cpu.UsageNanoCores != nil || got.Cpu.Psi != nil || got.Swap != nil || got.Io != nil {
		t.Errorf("absent values must be absent: %v", got)
	}
	if got.Memory.UsageBytes == nil || got.Attributes.Metadata == nil || got.Cpu.Timestamp != 1e9 {
		t.Errorf("got %v", got)
	}
	v := uint64(7)
	s.MemoryAvailable, s.SwapUsage = &v, &v
	s.IOPressure = &sandbox.Pressure{Some: &sandbox.PSI{Total: 5}}
	got = ContainerStats(s)
	if got.Memory.AvailableBytes.Value != 7 || got.Swap.SwapUsageBytes.Value != 7 || got.Io.Psi.Some.Total != 5 || got.Io.Psi.Full != nil {
		t.Errorf("got %v", got)
	}
}
