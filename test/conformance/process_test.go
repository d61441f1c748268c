package conformance

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestImageConfigAndOverrides: what the image says holds until the request says
// otherwise.
func TestImageConfigAndOverrides(t *testing.T) {
	ref := pushImage(t, "config", func(c *v1.Config) {
		c.Env = []string{"PATH=/bin", "FROM_IMAGE=1", "BOTH=image"}
		c.WorkingDir = "/made/on/demand"
		c.Entrypoint, c.Cmd = []string{"/bin/prog", "echo"}, []string{"from", "cmd"}
		c.StopSignal = "SIGUSR1"
		c.Labels = map[string]string{"image": "label"}
	})
	img := pullID(t, ref)
	p := runPod(t, nil)
	output := func(change func(*cri.ContainerConfig)) string {
		t.Helper()
		c := started(t, p, func(c *cri.ContainerConfig) {
			c.Image.Image, c.Args = img, nil
			change(c)
		})
		waitExit(t, c)
		var out []string
		for _, r := range logs(t, c) {
			out = append(out, r.content)
		}
		return strings.Join(out, "\n")
	}
	for name, row := range map[string]struct {
		change func(*cri.ContainerConfig)
		want   string
	}{
		"entrypoint and cmd":        {func(*cri.ContainerConfig) {}, "from cmd"},
		"args replace cmd":          {func(c *cri.ContainerConfig) { c.Args = []string{"mine"} }, "mine"},
		"command drops cmd too":     {func(c *cri.ContainerConfig) { c.Command = []string{"/bin/echo"} }, ""},
		"command and args":          {func(c *cri.ContainerConfig) { c.Command, c.Args = []string{"/bin/echo", "a"}, []string{"b"} }, "a b"},
		"program found in PATH":     {func(c *cri.ContainerConfig) { c.Command = []string{"echo", "found"} }, "found"},
		"workdir of the image":      {func(c *cri.ContainerConfig) { c.Command = []string{"pwd"} }, "/made/on/demand"},
		"workdir of the request":    {func(c *cri.ContainerConfig) { c.Command, c.WorkingDir = []string{"pwd"}, "/another/new/one" }, "/another/new/one"},
		"env of the image":          {func(c *cri.ContainerConfig) { c.Command = []string{"env", "FROM_IMAGE", "BOTH"} }, "1\nimage"},
		"the request's key wins":    {func(c *cri.ContainerConfig) { c.Command, c.Envs = []string{"env", "BOTH"}, env("BOTH", "mine") }, "mine"},
		"the last of a key wins":    {func(c *cri.ContainerConfig) { c.Command, c.Envs = []string{"env", "K"}, env("K", "1", "K", "2") }, "2"},
		"bytes of a value":          {func(c *cri.ContainerConfig) { c.Command, c.Envs = []string{"env", "K"}, env("K", "a=b\xff \t") }, "a=b\xff \t"},
		"an empty value is a value": {func(c *cri.ContainerConfig) { c.Command, c.Envs = []string{"env", "FROM_IMAGE"}, env("FROM_IMAGE", "") }, ""},
		"home of root":              {func(c *cri.ContainerConfig) { c.Command = []string{"env", "HOME"} }, "/root"},
		"home of the user":          {func(c *cri.ContainerConfig) { c.Command = []string{"env", "HOME"}; runAs(c, 1000) }, "/home/tester"},
		"home of a nameless user":   {func(c *cri.ContainerConfig) { c.Command = []string{"env", "HOME"}; runAs(c, 4711) }, "/"},
		"home of the request":       {func(c *cri.ContainerConfig) { c.Command, c.Envs = []string{"env", "HOME"}, env("HOME", "/h") }, "/h"},
		"no TERM without terminal":  {func(c *cri.ContainerConfig) { c.Command = []string{"env", "TERM"} }, ""},
		"TERM with a terminal":      {func(c *cri.ContainerConfig) { c.Command, c.Tty = []string{"env", "TERM"}, true }, "xterm\r"},
		"a pod's host name":         {func(c *cri.ContainerConfig) { c.Command = []string{"env", "HOSTNAME"} }, p.config.Hostname},
	} {
		t.Run(name, func(t *testing.T) {
			if got := output(row.change); got != row.want {
				t.Errorf("%q, want %q", got, row.want)
			}
		})
	}
	t.Run("bytes of a value in an exec", func(t *testing.T) {
		c := started(t, p, func(c *cri.ContainerConfig) { c.Envs = env("K", "a\xff\x01b") })
		if out := execOut(t, c, "/bin/env", "K"); out != "a\xff\x01b\n" {
			t.Errorf("%q", out)
		}
		restart(t, nil)
		if out := execOut(t, c, "/bin/env", "K"); out != "a\xff\x01b\n" {
			t.Errorf("after a restart: %q", out)
		}
	})
	t.Run("the missing workdir is root's", func(t *testing.T) {
		got := output(func(c *cri.ContainerConfig) {
			c.Command = []string{"stat", "/made/on/demand"}
			runAs(c, 1000)
		})
		if !strings.Contains(got, "d0755 0:0") {
			t.Errorf("%s", got)
		}
	})
	t.Run("nothing to run", func(t *testing.T) {
		empty := pullID(t, pushImage(t, "empty", func(c *v1.Config) { c.Entrypoint, c.Cmd = nil, nil }))
		cfg := containerConfig(nil)
		cfg.Image.Image = empty
		_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
		wantCode(t, err, codes.InvalidArgument, "command")
	})
}

func env(kv ...string) (out []*cri.KeyValue) {
	for i := 0; i+1 < len(kv); i += 2 {
		out = append(out, &cri.KeyValue{Key: kv[i], Value: []byte(kv[i+1])})
	}
	return out
}

func runAs(c *cri.ContainerConfig, uid int64) {
	c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: uid}
}

// TestUserOfTheImage: every form of USER, for the first process, for an exec and
// in the status.
func TestUserOfTheImage(t *testing.T) {
	p := runPod(t, nil)
	for user, want := range map[string]string{
		"":            "uid=0 gid=0 groups=0",
		"tester":      "uid=1000 gid=1000 groups=500,501,1000",
		"1000":        "uid=1000 gid=1000 groups=500,501,1000",
		"tester:crew": "uid=1000 gid=500 groups=500,501",
		"1000:501":    "uid=1000 gid=501 groups=500,501",
		"4711":        "uid=4711 gid=0 groups=0",
		"4711:4712":   "uid=4711 gid=4712 groups=4712",
		"nobody:":     "uid=65534 gid=65534 groups=501,65534",
	} {
		t.Run("USER "+user, func(t *testing.T) {
			repo := "user-" + strings.ReplaceAll(user, ":", "-") + "x"
			img := pullID(t, pushImage(t, repo, func(c *v1.Config) { c.User = user }))
			c := started(t, p, func(c *cri.ContainerConfig) { c.Image.Image, c.Command = img, []string{"/bin/id"} })
			waitExit(t, c)
			if l := logs(t, c); len(l) != 1 || l[0].content != want {
				t.Errorf("first process: %v, want %s", l, want)
			}
			d := started(t, p, func(c *cri.ContainerConfig) { c.Image.Image = img })
			if out := execOut(t, d, "/bin/id"); out != want+"\n" {
				t.Errorf("exec: %s, want %s", out, want)
			}
			is := imageStatus(t, img)
			name, _, _ := strings.Cut(user, ":")
			switch {
			case name == "":
				if is.Uid != nil || is.Username != "" {
					t.Errorf("image status: uid %v username %q", is.Uid, is.Username)
				}
			case name[0] >= '0' && name[0] <= '9':
				if is.Uid == nil || is.Username != "" {
					t.Errorf("image status: uid %v username %q", is.Uid, is.Username)
				}
			case is.Uid != nil || is.Username != name:
				t.Errorf("image status: uid %v username %q", is.Uid, is.Username)
			}
		})
	}
	bad := pullID(t, pushImage(t, "user-bad", func(c *v1.Config) { c.User = "no-such-user" }))
	cfg := containerConfig([]string{"true"})
	cfg.Image.Image = bad
	_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	wantCode(t, err, codes.InvalidArgument, "no-such-user")
}

// TestSupplementalGroupsPolicy: Merge adds the image's memberships, Strict does
// not; execs and the status show the same identity as the first process.
func TestSupplementalGroupsPolicy(t *testing.T) {
	p := runPod(t, nil)
	for policy, want := range map[cri.SupplementalGroupsPolicy]string{
		cri.SupplementalGroupsPolicy_Merge:  "uid=1000 gid=1000 groups=77,500,501,1000",
		cri.SupplementalGroupsPolicy_Strict: "uid=1000 gid=1000 groups=77,1000",
	} {
		c := started(t, p, func(c *cri.ContainerConfig) {
			runAs(c, 1000)
			c.Linux.SecurityContext.SupplementalGroups = []int64{77}
			c.Linux.SecurityContext.SupplementalGroupsPolicy = policy
		})
		if out := execOut(t, c, "/bin/id"); out != want+"\n" {
			t.Errorf("%v: exec is %s, want %s", policy, out, want)
		}
		if out := execOut(t, c, "/bin/cat", "/proc/1/status"); groupsOf(out) != strings.ReplaceAll(want[strings.Index(want, "groups=")+7:], ",", " ") {
			t.Errorf("%v: first process has groups %s", policy, groupsOf(out))
		}
		u := containerStatus(t, c).User.Linux
		slices.Sort(u.SupplementalGroups)
		if got := strings.Trim(strings.ReplaceAll(joined(u.SupplementalGroups), " ", ","), "[]"); u.Uid != 1000 || u.Gid != 1000 || !strings.HasSuffix(want, "groups="+got) {
			t.Errorf("%v: status.user = %v", policy, u)
		}
	}
	byName := started(t, p, secure(func(s *cri.LinuxContainerSecurityContext) {
		s.RunAsUsername, s.RunAsGroup = "tester", &cri.Int64Value{Value: 501}
	}))
	if out := execOut(t, byName, "/bin/id"); out != "uid=1000 gid=501 groups=500,501\n" {
		t.Errorf("run_as_username with run_as_group: %s", out)
	}
}

func groupsOf(status string) string {
	for line := range strings.Lines(status) {
		if g, ok := strings.CutPrefix(line, "Groups:"); ok {
			f := strings.Fields(g)
			slices.SortFunc(f, func(a, b string) int {
				if len(a) != len(b) {
					return len(a) - len(b)
				}
				return strings.Compare(a, b)
			})
			return strings.Join(f, " ")
		}
	}
	return ""
}

func joined(ids []int64) string {
	var out []string
	for _, i := range ids {
		out = append(out, strconv.FormatInt(i, 10))
	}
	return strings.Join(out, ",")
}

// TestStopSignals: the request's, else the image's, else SIGTERM; the status
// says which.
func TestStopSignals(t *testing.T) {
	p := runPod(t, nil)
	img := pullID(t, pushImage(t, "stopsignal", func(c *v1.Config) { c.StopSignal = "SIGUSR1" }))
	odd := pullID(t, pushImage(t, "stopsignal-odd", func(c *v1.Config) { c.StopSignal = "SIGNONSENSE" }))
	number := pullID(t, pushImage(t, "stopsignal-number", func(c *v1.Config) { c.StopSignal = "3" }))
	for name, row := range map[string]struct {
		image string
		given cri.Signal
		want  int32
		shown cri.Signal
	}{
		"default":             {images.prog, cri.Signal_SIGNAL_RUNTIME_DEFAULT, 15, cri.Signal_SIGNAL_SIGTERM},
		"of the image":        {img, cri.Signal_SIGNAL_RUNTIME_DEFAULT, 10, cri.Signal_SIGNAL_SIGUSR1},
		"of the request":      {img, cri.Signal_SIGNAL_SIGUSR2, 12, cri.Signal_SIGNAL_SIGUSR2},
		"a number":            {number, cri.Signal_SIGNAL_RUNTIME_DEFAULT, 3, cri.Signal_SIGNAL_SIGQUIT},
		"an image's nonsense": {odd, cri.Signal_SIGNAL_RUNTIME_DEFAULT, 15, cri.Signal_SIGNAL_SIGTERM},
		"real time, +1":       {img, cri.Signal_SIGNAL_SIGRTMINPLUS1, 35, cri.Signal_SIGNAL_SIGRTMINPLUS1},
		"real time, +3":       {img, cri.Signal_SIGNAL_SIGRTMINPLUS3, 37, cri.Signal_SIGNAL_SIGRTMINPLUS3},
		"real time, last":     {img, cri.Signal_SIGNAL_SIGRTMAX, 64, cri.Signal_SIGNAL_SIGRTMAX},
		"real time, -2":       {img, cri.Signal_SIGNAL_SIGRTMAXMINUS2, 62, cri.Signal_SIGNAL_SIGRTMAXMINUS2},
	} {
		t.Run(name, func(t *testing.T) {
			c := started(t, p, func(c *cri.ContainerConfig) {
				c.Image.Image, c.Args, c.StopSignal = row.image, []string{"signal-report"}, row.given
			})
			waitLog(t, c, "ready")
			if s := containerStatus(t, c); s.StopSignal != row.shown {
				t.Errorf("status says %v, want %v", s.StopSignal, row.shown)
			}
			stop(t, c, 10)
			if s := containerStatus(t, c); s.ExitCode != 100+row.want || s.Reason != "Error" {
				t.Errorf("got signal %d, want %d", s.ExitCode-100, row.want)
			}
		})
	}
}
