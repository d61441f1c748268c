package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/oci/supervisor/client"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/pace"
)

// fsck runs `berth fsck` on the node and returns its findings, as "kind name", its
// exit code and what it says on stderr.
func fsck(t *testing.T, args ...string) (found []string, code int, stderr string) {
	t.Helper()
	bin, err := harness.Bin()
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{"fsck", "-o", "json", "--config", filepath.Join(node.Dir, "config.toml"),
		"--root", filepath.Join(node.Dir, "root"), "--state", filepath.Join(node.Dir, "run")}, args...)
	cmd := exec.CommandContext(ctx(t), filepath.Join(bin, "berth"), args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var report struct {
		Findings []struct {
			Kind, Name, Detail, Remedy, Error string
			Removed                           bool
		}
		Unseen string
	}
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &report); err != nil {
			t.Fatalf("%v: %s", err, &out)
		}
	}
	if report.Unseen != "" {
		t.Errorf("fsck could not look everywhere: %s", report.Unseen)
	}
	for _, f := range report.Findings {
		if f.Detail == "" {
			t.Errorf("%s %s: no word why", f.Kind, f.Name)
		}
		if f.Error != "" {
			t.Errorf("%s %s: %s", f.Kind, f.Name, f.Error)
		}
		if !strings.Contains(f.Remedy, "no other Berth") && !strings.Contains(f.Remedy, "another Berth's") { // those of other daemons of this machine
			found = append(found, f.Kind+" "+f.Name)
		}
	}
	slices.Sort(found)
	return found, cmd.ProcessState.ExitCode(), errOut.String()
}

// planted is what a plant has put on the node, as fsck names it.
type planted struct {
	want  []string
	there []func() bool // each of it is still there
}

// plant leaves on the node, whose daemon is down, what crashes and bugs could.
func plant(t *testing.T, pod string) *planted {
	t.Helper()
	p := &planted{}
	run, root := filepath.Join(node.Dir, "run"), filepath.Join(node.Dir, "root")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	add := func(kind leftover.Kind, name string, there func() bool) {
		p.want = append(p.want, string(kind)+" "+name)
		p.there = append(p.there, there)
	}
	dir := func(kind leftover.Kind, path string) {
		must(os.MkdirAll(path, 0o755))
		add(kind, path, func() bool { _, err := os.Lstat(path); return err == nil })
	}
	isMount := func(path string) func() bool {
		return func() bool {
			b, _ := os.ReadFile("/proc/self/mounts")
			return strings.Contains(string(b), " "+path+" ")
		}
	}
	deadPod, deadCtr, ghost := string(id.NewPod()), string(id.NewContainer()), id.NewContainer()

	dir(leftover.PodFiles, filepath.Join(run, "pods", deadPod))
	layer := filepath.Join(root, "containers", deadCtr[:1], deadCtr)
	dir(leftover.Layer, layer)
	dir(leftover.ImageLayer, filepath.Join(root, "images", "staging", "layer-"+deadCtr[:9]))
	dir(leftover.ImageLayer, filepath.Join(root, "images", "layers", "sha256-"+deadCtr, "fs"))
	p.want[len(p.want)-1] = strings.TrimSuffix(p.want[len(p.want)-1], "/fs")

	at := filepath.Join(layer, "rootfs")
	must(os.Mkdir(at, 0o755))
	must(unix.Mount("none", at, "tmpfs", 0, "size=4k"))
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	add(leftover.Mount, at, isMount(at))

	pin := filepath.Join(run, "cni", "netns", string(id.NewPod()))
	must(os.MkdirAll(filepath.Dir(pin), 0o700))
	must(os.WriteFile(pin, nil, 0o400))
	must(unix.Mount("/proc/self/ns/net", pin, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(pin, unix.MNT_DETACH) })
	add(leftover.NetNS, pin, isMount(pin))

	// A link as a pod's with the address 10.164.250.9, and an address that is on record.
	other, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, nil)
	must(err)
	t.Cleanup(func() { other[0].Close() })
	a := netlink.NewLinkAttrs()
	a.Name, a.Index = "berth0aa4fa09", 1<<24|0xa4fa09
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(other[0].Fd()))}))
	t.Cleanup(func() { _ = netlink.LinkDel(&netlink.Veth{LinkAttrs: a}) })
	add(leftover.Link, a.Name, func() bool { _, err := netlink.LinkByName(a.Name); return err == nil })
	record := filepath.Join(run, "network", "pods", deadPod+".json")
	sealed, err := durable.Seal(map[string]any{"version": 1, "pod": deadPod, "name": "test/dead", "link": "berth0aa4fa0a", "ips": []string{"10.164.250.10"}})
	must(err)
	must(os.WriteFile(record, sealed, 0o600))
	add(leftover.Address, "10.164.250.10", func() bool { _, err := os.Stat(record); return err == nil })

	c, err := nftables.New()
	must(err)
	set, err := c.GetSetByName(&nftables.Table{Name: "berth", Family: nftables.TableFamilyINet}, "ports4")
	must(err)
	key := []byte{unix.IPPROTO_TCP, 0, 0, 0, 0x77, 0x77, 0, 0}
	must(c.SetAddElements(set, []nftables.SetElement{{Key: key, Val: []byte{10, 164, 250, 9, 0, 80, 0, 0}}}))
	must(c.Flush())
	add(leftover.Port, "TCP port 30583 on all addresses, ports4", func() bool {
		elems, _ := c.GetSetElements(set)
		return slices.ContainsFunc(elems, func(e nftables.SetElement) bool { return bytes.Equal(e.Key, key) })
	})

	// A process in a cgroup beside those of the live pod.
	cgroup := "/berth/" + pod + "/" + deadCtr
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(cmd.Start())
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	for _, h := range hierarchies(t) {
		if strings.Contains(h, "cpuset") { // takes no process before it has cpus
			continue
		}
		must(os.MkdirAll(h+cgroup, 0o755))
		t.Cleanup(func() { _ = unix.Rmdir(h + cgroup) })
		must(os.WriteFile(h+cgroup+"/cgroup.procs", []byte(strconv.Itoa(cmd.Process.Pid)), 0))
	}
	past, err := os.OpenFile(filepath.Join(run, "past"), os.O_WRONLY|os.O_APPEND, 0)
	must(err)
	_, err = fmt.Fprintf(past, "\n%d %s %s.", time.Now().Unix(), deadCtr, cgroup)
	must(errors.Join(err, past.Close()))
	add(leftover.Cgroup, cgroup, func() bool {
		_, err := os.Stat("/sys/fs/cgroup/pids" + cgroup)
		return err == nil || exists("/sys/fs/cgroup"+cgroup)
	})
	add(leftover.Process, strconv.Itoa(cmd.Process.Pid), func() bool {
		select {
		case <-ended:
			return false
		default:
			return true
		}
	})

	// What the supervisor holds: a descriptor, a container that runs, and its log.
	s, err := client.Open(context.Background(), client.Config{StateDir: run})
	must(err)
	defer s.Close()
	descriptor := deadPod + "/net"
	must(s.PutFDs(context.Background(), []string{descriptor}, other))
	must(s.Create(context.Background(), wire.Create{ID: ghost, PodInit: true, Spec: &specs.Spec{
		Version: specs.Version, Process: &specs.Process{Cwd: "/", Args: []string{"init"}, NoNewPrivileges: true},
		Linux: &specs.Linux{CgroupsPath: "/berth/" + pod + "/" + string(ghost), Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}}},
	}}))
	log := filepath.Join(node.Dir, "log", "ghost"+string(ghost[:8]), "0.log")
	_, err = s.Start(context.Background(), wire.Start{ID: ghost, LogPath: log})
	must(err)
	supervisor := func(ask func(*client.Client) bool) func() bool {
		return func() bool {
			s, err := client.Open(context.Background(), client.Config{StateDir: run})
			if err != nil {
				t.Error(err)
				return false
			}
			defer s.Close()
			return ask(s)
		}
	}
	add(leftover.Descriptor, descriptor, supervisor(func(s *client.Client) bool {
		keys, _ := s.ListFDs(context.Background())
		return slices.Contains(keys, descriptor)
	}))
	add(leftover.Container, string(ghost), supervisor(func(s *client.Client) bool {
		list, _ := s.List(context.Background())
		return slices.ContainsFunc(list, func(i wire.Info) bool { return i.ID == ghost })
	}))
	add(leftover.Log, log, func() bool {
		return descriptors(t, node.SupervisorPid())[log] > 0
	})
	slices.Sort(p.want)
	return p
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// left are those of what was planted that are still there.
func (p *planted) left() (n int) {
	for _, there := range p.there {
		if there() {
			n++
		}
	}
	return n
}

// configured restarts the daemon with its configuration changed, until the end of the test.
func configured(t *testing.T, change func(string) string) {
	t.Helper()
	file := filepath.Join(node.Dir, "config.toml")
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Config(change(string(old))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Config(string(old)); err != nil {
			t.Error(err)
		}
		restart(t, nil)
	})
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// leftoverMetrics reads the counters that are not 0, by name and kind.
func leftoverMetrics(t *testing.T, address string) map[string]float64 {
	t.Helper()
	r, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if v, err := strconv.ParseFloat(value, 64); err == nil && v != 0 && strings.HasPrefix(name, "berth_leftovers_") {
			out[name] = v
		}
	}
	return out
}

// TestLeftovers plants what crashes and bugs could leave beside live pods. fsck names
// each and changes nothing; the daemon removes it at its start and counts it; fsck
// --repair removes it too. The live pods notice nothing.
func TestLeftovers(t *testing.T) {
	metrics := freePort(t)
	configured(t, func(old string) string {
		return fmt.Sprintf("metrics_address = %q\n%s\n[runtime]\nreconcile = \"300ms\"\n", metrics, old)
	})
	if _, code, text := fsck(t); code != 3 || !strings.Contains(text, fmt.Sprintf("pid %d", node.Pid())) || !strings.Contains(text, "or stop it first") {
		t.Errorf("beside a running daemon: exit code %d, %q", code, text)
	}
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{ContainerPort: 7000, HostPort: 17000}}
	})
	shared := runPod(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD })
	c, exited := run(t, p, "listen", "tcp", ":7000"), run(t, p, "exit", "3")
	waitLog(t, c, "listening")
	waitExit(t, exited)
	inShared, created := run(t, shared, "sleep", "1000"), create(t, p, nil)
	fine := func(when string) {
		t.Helper()
		for _, q := range []*pod{p, shared} {
			if s := podStatus(t, q.id); s.State != cri.PodSandboxState_SANDBOX_READY {
				t.Errorf("%s: pod %v", when, s)
			}
		}
		for _, k := range []string{c, inShared} {
			if out, _, code := execSync(t, k, "/bin/echo", "here"); code != 0 || out != "here\n" {
				t.Errorf("%s: exec: %q, %d", when, out, code)
			}
		}
		conn, err := net.DialTimeout("tcp", harness.NodeIP+":17000", pace.Wait(5*time.Second))
		if err != nil {
			t.Errorf("%s: host port: %v", when, err)
			return
		}
		_ = conn.Close()
	}
	down := func() {
		t.Helper()
		if err := node.Kill(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	up := func() {
		t.Helper()
		if err := node.Start(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if node.Pid() == 0 {
			up()
		}
	})

	down()
	if found, code, text := fsck(t); code != 0 || len(found) > 0 || text != "" {
		t.Errorf("pods run, nothing is left over, and fsck says %d %q %q", code, found, text)
	}
	planted := plant(t, p.id)
	for range 2 {
		found, code, _ := fsck(t)
		if code != 1 || !slices.Equal(found, planted.want) {
			t.Errorf("exit code %d, found\n%s\nwant\n%s", code, strings.Join(found, "\n"), strings.Join(planted.want, "\n"))
		}
	}
	if n := planted.left(); n != len(planted.want) {
		t.Fatalf("looking removed something: %d of %d are left", n, len(planted.want))
	}

	up()
	// What is staged, and a layer that is not whole, is gone before the first look; the
	// table of ports is made anew; the log is closed with its container.
	counted := []leftover.Kind{leftover.Container, leftover.Process, leftover.Cgroup, leftover.Descriptor, leftover.Mount, leftover.NetNS, leftover.Address, leftover.Link, leftover.Layer, leftover.PodFiles}
	settle(t, "leftovers of a daemon that runs", func() string {
		got := leftoverMetrics(t, metrics)
		var missing []string
		for _, k := range counted {
			for _, name := range []string{"found", "removed"} {
				if name := fmt.Sprintf("berth_leftovers_%s_total{kind=%q}", name, k); got[name] == 0 {
					missing = append(missing, name)
				}
			}
		}
		if n := planted.left(); n > 0 || len(missing) > 0 {
			return fmt.Sprintf("%d are left, not counted: %q", n, missing)
		}
		return ""
	})
	got := leftoverMetrics(t, metrics)
	for name, n := range got {
		if strings.Contains(name, "found_total") && n != 1 {
			t.Errorf("%s is %v, one was planted", name, n)
		}
	}
	if at := time.Unix(int64(got["berth_leftovers_round_timestamp_seconds"]), 0); time.Since(at) > time.Minute || got["berth_leftovers_round_duration_seconds"] <= 0 {
		t.Errorf("last round: %v, %v s", at, got["berth_leftovers_round_duration_seconds"])
	}
	fine("after the daemon's rounds")

	down()
	if found, code, _ := fsck(t); code != 0 || len(found) > 0 {
		t.Errorf("the daemon has removed all, and fsck says %d %q", code, found)
	}
	planted = plant(t, p.id)
	found, code, _ := fsck(t, "--repair")
	if code != 0 || !slices.Equal(found, planted.want) || planted.left() > 0 {
		t.Errorf("repair: exit code %d, %d are left, found\n%s\nwant\n%s", code, planted.left(), strings.Join(found, "\n"), strings.Join(planted.want, "\n"))
	}
	if found, code, _ := fsck(t); code != 0 || len(found) > 0 {
		t.Errorf("after the repair fsck says %d %q", code, found)
	}
	up()
	fine("after the repair")
	start(t, created)
	if s := containerStatus(t, exited); s.ExitCode != 3 {
		t.Errorf("an exit code was lost: %v", s)
	}
	if len(got) > 0 {
		settle(t, "leftovers after the repair", func() string {
			for name, n := range leftoverMetrics(t, metrics) {
				if strings.Contains(name, "_total") {
					return fmt.Sprintf("%s is %v", name, n)
				}
			}
			return ""
		})
	}
}
