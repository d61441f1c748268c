package cni

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/leftover"
)

// fakePlugin logs each call as "verb netns" and keeps the call's input; files
// next to it steer it: <verb>.out is printed, <verb>.fail (a count) makes it
// fail that many times, <verb>.hang makes it hang with a child.
const fakePlugin = `#!/bin/sh
d=%DIR%
echo "$CNI_COMMAND ${CNI_NETNS:-none}" >> $d/log
echo "$CNI_ARGS" > $d/args
cat > $d/$CNI_COMMAND.in
if [ -e $d/$CNI_COMMAND.hang ]; then sleep 1000 & echo $! > $d/child; sleep 1000; fi
n=$(cat $d/$CNI_COMMAND.fail 2>/dev/null || echo 0)
if [ $n -gt 0 ]; then
  echo $((n-1)) > $d/$CNI_COMMAND.fail
  echo '{"cniVersion":"1.1.0","code":11,"msg":"no luck","details":"try later"}'
  exit 1
fi
if [ -e $d/$CNI_COMMAND.out ]; then cat $d/$CNI_COMMAND.out; exit 0; fi
[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"10.1.2.3/24","interface":0},{"address":"fd00::3/64","interface":0}]}'
`

type bench struct {
	*testing.T
	cfg    Config
	plugin string // dir that steers the plugin
	s      *Selector
}

func newBench(t *testing.T) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes and pins network namespaces")
	}
	dir := t.TempDir()
	b := &bench{T: t, plugin: filepath.Join(dir, "plugin"), cfg: Config{
		ConfDir: filepath.Join(dir, "conf"), BinDir: filepath.Join(dir, "bin"), StateDir: filepath.Join(dir, "state"),
	}}
	for _, d := range []string{b.cfg.ConfDir, b.cfg.BinDir, b.plugin} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := strings.ReplaceAll(fakePlugin, "%DIR%", b.plugin)
	if err := os.WriteFile(filepath.Join(b.cfg.BinDir, "fake"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	b.conf("10-fake.conflist", fakeList)
	return b
}

const fakeList = `{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"fake","capabilities":{"portMappings":true}}]}`

func (b *bench) conf(name, content string) {
	b.Helper()
	path := filepath.Join(b.cfg.ConfDir, name)
	if err := os.WriteFile(path+".tmp", []byte(content), 0o600); err != nil {
		b.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) steer(name, content string) {
	b.Helper()
	if err := os.WriteFile(filepath.Join(b.plugin, name), []byte(content), 0o600); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) read(name string) string {
	b.Helper()
	c, _ := os.ReadFile(filepath.Join(b.plugin, name))
	return string(c)
}

func (b *bench) open() *Selector {
	b.Helper()
	s, err := Open(context.Background(), b.cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.s = s
	b.Cleanup(func() {
		for _, f := range b.leftovers() {
			if err := f.Remove(context.Background()); err != nil {
				b.Logf("%s %s at the end: %v", f.Kind, f.Name, err)
			}
		}
		if err := s.Close(); err != nil {
			b.Error(err)
		}
		if isMount(filepath.Join(b.cfg.StateDir, "netns")) {
			b.Error("the pin directory is still a mount")
		}
	})
	return s
}

func (b *bench) eventually(what string, ok func() bool) {
	b.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatalf("not within 5 s: %s", what)
		}
	}
}

// clean fails unless nothing of pod is left.
func (b *bench) clean(pod id.Pod) {
	b.Helper()
	if b.s.pins.holds(pod) {
		b.Error("the network namespace is still pinned")
	}
	for _, p := range []string{b.s.pins.path(pod), b.s.journalPath(pod)} {
		if _, err := os.Lstat(p); err == nil {
			b.Errorf("%s is left", p)
		}
	}
}

func testPod() Pod {
	return Pod{ID: id.NewPod(), Name: "web", Namespace: "shop", UID: "u1", PortMappings: []PortMapping{{ContainerPort: 80, HostPort: 8080}, {ContainerPort: 81}}}
}

func TestAttachDetach(t *testing.T) {
	b := newBench(t)
	s := b.open()
	if err := s.Ready(); err != nil {
		t.Fatal(err)
	}
	p := testPod()
	a, ns, err := s.Attach(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	want := []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00::3")}
	if a.Network != PluginNetwork || len(a.IPs) != 2 || a.IPs[0] != want[0] || a.IPs[1] != want[1] {
		t.Errorf("attachment %+v: want network cni and addresses %v", a, want)
	}
	if !s.pins.holds(p.ID) || a.NetNSPath != s.pins.path(p.ID) {
		t.Errorf("netns path %q is not the pin", a.NetNSPath)
	}
	if got := b.read("args"); !strings.Contains(got, "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID="+string(p.ID)+";K8S_POD_UID=u1") {
		t.Errorf("CNI_ARGS %q", got)
	}
	if got := b.read("ADD.in"); !strings.Contains(got, `"portMappings":[{"containerPort":80,"hostPort":8080,"protocol":"tcp"}]`) && !strings.Contains(got, `"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]`) {
		t.Errorf("ADD got %s", got)
	}
	err = kernel.In(kernel.NetNS, ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil && lo.Attrs().Flags&1 == 0 {
			err = errors.New("lo is down")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if _, _, err := s.Attach(context.Background(), p); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second attach: got %v, want already exists", err)
	}
	for range 2 { // the second finds nothing and succeeds
		if err := s.Detach(context.Background(), p, a, ns); err != nil {
			t.Fatal(err)
		}
	}
	if got := b.read("DEL.in"); !strings.Contains(got, `"prevResult"`) {
		t.Errorf("DEL got %s: want the result of ADD", got)
	}
	b.clean(p.ID)
}

// TestAttachOwnNamespace: plugins get the namespace that a pod brings along.
func TestAttachOwnNamespace(t *testing.T) {
	b := newBench(t)
	s := b.open()
	files, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, nil)
	if err != nil {
		t.Fatal(err)
	}
	own := files[0]
	defer own.Close()
	p := testPod()
	p.NetNS = own
	a, ns, err := s.Attach(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	want, err := own.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ns.Stat(); err != nil || !os.SameFile(got, want) {
		t.Errorf("Attach returns another namespace (%v)", err)
	}
	if got, err := os.Stat(a.NetNSPath); err != nil || !os.SameFile(got, want) {
		t.Errorf("another namespace is pinned (%v)", err)
	}
	if got := b.read("ADD.in"); strings.Contains(got, "NetNS") {
		t.Errorf("ADD got %s", got)
	}
	if err := s.Detach(context.Background(), p, a, ns); err != nil {
		t.Fatal(err)
	}
	b.clean(p.ID)
}

func TestAttachErrors(t *testing.T) {
	for name, tc := range map[string]struct{ file, content, want string }{
		"fails":    {"ADD.fail", "1", "cni plugin fake ADD: exit status 1 (code 11): no luck try later"},
		"garbage":  {"ADD.out", "segfault at 0" + strings.Repeat("x", 5000), "result is not a JSON object: segfault at 0xxx"},
		"null":     {"ADD.out", "null", "result is not a JSON object"},
		"empty":    {"ADD.out", "", "result is not a JSON object"},
		"no ip":    {"ADD.out", `{"cniVersion":"1.1.0"}`, "has no address"},
		"bad ref":  {"ADD.out", `{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.1/8","interface":7}]}`, "interface 7"},
		"too much": {"ADD.out", strings.Repeat("x", maxOutput+1), "output is larger than"},
		"hangs":    {"ADD.hang", "", "killed: no answer within 500ms"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.cfg.Timeout = 500 * time.Millisecond
			s := b.open()
			b.steer(tc.file, tc.content)
			p := testPod()
			start := time.Now()
			_, _, err := s.Attach(context.Background(), p)
			if err == nil || !strings.Contains(err.Error(), tc.want) || len(err.Error()) > 2000 {
				t.Fatalf("got %v, want ...%s...", err, tc.want)
			}
			if time.Since(start) > 3*time.Second {
				t.Errorf("took %v", time.Since(start))
			}
			if !strings.Contains(b.read("log"), "DEL /") {
				t.Errorf("calls %q: want a DEL after the failed ADD", b.read("log"))
			}
			b.clean(p.ID)
			if child := strings.TrimSpace(b.read("child")); child != "" {
				b.eventually("the plugin's child is killed", func() bool {
					st, err := os.ReadFile("/proc/" + child + "/stat")
					return err != nil || strings.Contains(string(st), ") Z ")
				})
			}
		})
	}
}

func TestDelFailsThenSucceeds(t *testing.T) {
	b := newBench(t)
	s := b.open()
	p := testPod()
	b.steer("ADD.fail", "1")
	b.steer("DEL.fail", "3") // the one after the ADD, and two of ours
	if _, _, err := s.Attach(context.Background(), p); err == nil {
		t.Fatal("attach succeeded")
	}
	for i := range 3 {
		err := s.Detach(context.Background(), p, Attachment{}, nil)
		if (err == nil) != (i == 2) {
			t.Fatalf("detach %d: %v", i, err)
		}
		var pe *PluginError
		if err != nil && (!errors.As(err, &pe) || pe.Verb != "DEL" || pe.Code != 11) {
			t.Fatalf("detach %d: %v: want a PluginError of DEL", i, err)
		}
	}
	b.clean(p.ID)
}

// DEL must use the configuration and result of ADD when the file has gone, the
// daemon restarted and the node rebooted.
func TestDetachAfterReboot(t *testing.T) {
	b := newBench(t)
	s := b.open()
	p := testPod()
	a, ns, err := s.Attach(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	if err := s.pins.remove(p.ID); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{s.journalPath(p.ID), filepath.Join(b.cfg.StateDir, "cache"), filepath.Join(b.cfg.ConfDir, "10-fake.conflist")} {
		if err := os.RemoveAll(d); err != nil {
			t.Fatal(err)
		}
	}
	enc, err := json.Marshal(a) // as the engine's journal does
	if err != nil {
		t.Fatal(err)
	}
	a = Attachment{}
	if err := json.Unmarshal(enc, &a); err != nil {
		t.Fatal(err)
	}
	b.eventually("the configuration is gone", func() bool { return s.Ready() != nil })
	if err := s.Detach(context.Background(), p, a, nil); err != nil {
		t.Fatal(err)
	}
	if got := b.read("log"); !strings.HasSuffix(got, "DEL none\n") {
		t.Errorf("calls %q: want a DEL without netns", got)
	}
	if got := b.read("DEL.in"); !strings.Contains(got, "10.1.2.3/24") {
		t.Errorf("DEL got %s: want the result of ADD", got)
	}
}

// TestJournalOfAnEarlierVersion has no checksum. The plugins are told of the pod's own
// configuration and result, although nobody else has them.
func TestJournalOfAnEarlierVersion(t *testing.T) {
	b := newBench(t)
	s := b.open()
	p := testPod()
	a, ns, err := s.Attach(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	if err := os.WriteFile(s.journalPath(p.ID), a.State, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(b.cfg.StateDir, "cache")); err != nil {
		t.Fatal(err)
	}
	if err := s.Detach(context.Background(), p, Attachment{}, nil); err != nil {
		t.Fatal(err)
	}
	if got := b.read("DEL.in"); !strings.Contains(got, "10.1.2.3/24") {
		t.Errorf("DEL got %s: want the result of ADD", got)
	}
	if _, err := os.Stat(s.journalPath(p.ID) + ".bad"); err == nil {
		t.Error("the journal was set aside")
	}
}

// fakeNetwork is a default network that only counts.
type fakeNetwork struct{ attached, detached int }

func (f *fakeNetwork) Attach(context.Context, Pod) (Attachment, *os.File, error) {
	f.attached++
	ns, err := os.Open("/proc/self/ns/net")
	return Attachment{Network: "fake"}, ns, err
}

func (f *fakeNetwork) Detach(context.Context, Pod, Attachment, *os.File) error {
	f.detached++
	return nil
}
func (f *fakeNetwork) Ready() error { return nil }
func (f *fakeNetwork) Leftovers(context.Context, InUse) ([]leftover.Finding, error) {
	return []leftover.Finding{{Kind: leftover.Link, Name: "of the default network"}}, nil
}

func TestConfDirIsFollowed(t *testing.T) {
	b := newBench(t)
	def := &fakeNetwork{}
	b.cfg.Default = def
	if err := os.RemoveAll(b.cfg.ConfDir); err != nil {
		t.Fatal(err)
	}
	s := b.open()
	p := testPod()
	a, ns, err := s.Attach(context.Background(), p)
	if err != nil || a.Network != "fake" {
		t.Fatalf("without configuration: %+v, %v; want the default network", a, err)
	}
	ns.Close()
	if err := os.MkdirAll(b.cfg.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	b.conf("20-broken.conflist", "{")
	b.eventually("a broken configuration is reported", func() bool { return s.Ready() != nil })
	if err := s.Ready(); !strings.Contains(err.Error(), "20-broken.conflist") {
		t.Errorf("ready: %v: want the file's name", err)
	}
	if _, _, err := s.Attach(context.Background(), testPod()); err == nil {
		t.Error("a broken configuration fell back to the default network")
	}
	b.conf("30-fake.conflist", fakeList)
	b.eventually("a valid configuration after a broken one is used", func() bool { return s.Ready() == nil })
	if err := s.Detach(context.Background(), p, a, nil); err != nil || def.detached != 1 {
		t.Errorf("detach of the first pod: %v, %d calls of the default network; want 1", err, def.detached)
	}
	p = testPod()
	a, ns, err = s.Attach(context.Background(), p)
	if err != nil || a.Network != PluginNetwork {
		t.Fatalf("with configuration: %+v, %v", a, err)
	}
	ns.Close()
	for _, f := range []string{"20-broken.conflist", "30-fake.conflist"} {
		if err := os.Remove(filepath.Join(b.cfg.ConfDir, f)); err != nil {
			t.Fatal(err)
		}
	}
	b.eventually("the default network is back", func() bool { return s.state.Load().list == nil && s.Ready() == nil })
	if err := s.Detach(context.Background(), p, a, nil); err != nil {
		t.Fatal(err)
	}
	b.clean(p.ID)
}

func TestNoNetworkAtAll(t *testing.T) {
	b := newBench(t)
	if err := os.Remove(filepath.Join(b.cfg.ConfDir, "10-fake.conflist")); err != nil {
		t.Fatal(err)
	}
	s := b.open()
	if err := s.Ready(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), b.cfg.ConfDir) {
		t.Errorf("ready: %v: want unavailable, naming the conf dir", err)
	}
	if _, _, err := s.Attach(context.Background(), testPod()); err == nil {
		t.Error("attached a pod to no network")
	}
}

func TestStatusVerb(t *testing.T) {
	b := newBench(t)
	b.steer("STATUS.fail", "1000")
	s := b.open()
	if err := s.Ready(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no luck") {
		t.Fatalf("ready: %v: want unavailable, with what the plugin said", err)
	}
	b.steer("STATUS.fail", "0")
	b.conf("10-fake.conflist", fakeList) // wakes the watch
	b.eventually("the plugin is well again", func() bool { return s.Ready() == nil })
}

func TestMissingPluginIsNotReady(t *testing.T) {
	b := newBench(t)
	b.conf("10-fake.conflist", `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"absent"}]}`)
	s := b.open()
	if err := s.Ready(); err == nil || !strings.Contains(err.Error(), "absent") || !strings.Contains(err.Error(), b.cfg.BinDir) {
		t.Errorf("ready: %v: want the plugin's name and the bin dir", err)
	}
}

// leftovers looks with the given pods in use.
func (b *bench) leftovers(live ...id.Pod) []leftover.Finding {
	b.Helper()
	found, err := b.s.Leftovers(context.Background(), InUse{Pod: func(p id.Pod) bool { return slices.Contains(live, p) }, IPs: func() []netip.Addr { return nil }})
	if err != nil {
		b.Fatal(err)
	}
	return slices.DeleteFunc(found, func(f leftover.Finding) bool { return f.Name == "of the default network" })
}

// TestLeftovers: an attachment of a pod that is gone is taken back by its plugins,
// a pin without an attachment goes, and neither of a pod in use is touched.
func TestLeftovers(t *testing.T) {
	b := newBench(t)
	s := b.open()
	live, dead, pinned := testPod(), testPod(), testPod()
	for _, p := range []Pod{live, dead} {
		_, ns, err := s.Attach(context.Background(), p)
		if err != nil {
			t.Fatal(err)
		}
		ns.Close()
	}
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := s.pins.add(pinned.ID, ns); err != nil {
		t.Fatal(err)
	}
	want := map[leftover.Kind]string{leftover.Address: string(dead.ID), leftover.NetNS: s.pins.path(pinned.ID)}
	found := b.leftovers(live.ID)
	offline, err := Look(b.cfg.StateDir, InUse{Pod: func(p id.Pod) bool { return p == live.ID }})
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range [][]leftover.Finding{found, offline} {
		if len(list) != len(want) {
			t.Errorf("found %+v, want %v", list, want)
		}
		for _, f := range list {
			if want[f.Kind] != f.Name {
				t.Errorf("found %s %q, want %v", f.Kind, f.Name, want)
			}
		}
	}
	if err := s.Collect(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := b.read("GC.in"); !strings.Contains(got, string(live.ID)) || !strings.Contains(got, string(dead.ID)) {
		t.Errorf("GC got %s: want all attachments", got)
	}
	if !s.pins.holds(dead.ID) || !s.pins.holds(pinned.ID) {
		t.Fatal("looking removed something")
	}
	done := s.begin(dead.ID)
	if left := b.leftovers(live.ID); len(left) != 1 || left[0].Kind != leftover.NetNS {
		t.Errorf("a pod that is being attached is a leftover: %+v", left)
	}
	done()
	for _, f := range found {
		if err := f.Remove(context.Background()); err != nil {
			t.Errorf("%s %s: %v", f.Kind, f.Name, err)
		}
	}
	b.clean(dead.ID)
	b.clean(pinned.ID)
	if !s.pins.holds(live.ID) {
		t.Error("the live pod lost its namespace")
	}
	if left := b.leftovers(live.ID); len(left) > 0 {
		t.Errorf("left: %+v", left)
	}
	if got := b.read("args"); strings.Contains(got, "K8S_POD_NAME=;") {
		t.Errorf("DEL of a pod that is gone got %q: want the names ADD got", got)
	}
}

func TestArgsCannotBeInjected(t *testing.T) {
	b := newBench(t)
	s := b.open()
	p := testPod()
	p.Name = "a;K8S_POD_UID=other"
	if _, _, err := s.Attach(context.Background(), p); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "metadata.name") {
		t.Errorf("got %v, want invalid argument naming the field", err)
	}
}

func TestCVE_2021_20206_PluginTypeIsNoPath(t *testing.T) {
	for _, typ := range []string{"../../bin/sh", "/bin/sh", "..", ".", "a/b", `a\\b`, ""} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "1.conflist"), []byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"`+typ+`"}]}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if list, _, err := loadConf(dir); err == nil {
			t.Errorf("type %q: accepted as %v", typ, list)
		}
	}
}

func TestLoadConfOrder(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"00-skip.txt": fakeList,
		"05-bad.conf": `{"name":"x"}`,
		"10-one.conf": `{"cniVersion":"1.0.0","name":"one","type":"bridge"}`,
		"20.conflist": fakeList,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list, file, err := loadConf(dir)
	if err != nil || list.Name != "one" || filepath.Base(file) != "10-one.conf" {
		t.Fatalf("got %v from %s, %v; want network one", list, file, err)
	}
	enc, err := encodeList(list)
	if err != nil {
		t.Fatal(err)
	}
	dec, err := decodeList(enc)
	if err != nil || dec.Name != "one" || dec.CNIVersion != "1.0.0" || len(dec.Plugins) != 1 || dec.Plugins[0].Network.Type != "bridge" {
		t.Errorf("round trip: %+v, %v", dec, err)
	}
}

// The reference plugins, where the distribution has them.
func TestReferencePtpPlugin(t *testing.T) {
	b := newBench(t)
	for _, dir := range []string{"/opt/cni/bin", "/usr/lib/cni"} {
		if _, err := os.Stat(filepath.Join(dir, "ptp")); err == nil {
			b.cfg.BinDir = dir
		}
	}
	if !strings.HasSuffix(b.cfg.BinDir, "cni") && b.cfg.BinDir != "/opt/cni/bin" {
		t.Skip("needs the reference CNI plugins in /opt/cni/bin or /usr/lib/cni")
	}
	b.conf("10-fake.conflist", `{"cniVersion":"1.0.0","name":"berth-test","plugins":[{"type":"ptp","ipam":{"type":"host-local","dataDir":"`+b.plugin+`","ranges":[[{"subnet":"10.211.0.0/24"}]]}}]}`)
	s := b.open()
	p := testPod()
	p.PortMappings = nil
	a, ns, err := s.Attach(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if len(a.IPs) != 1 || !netip.MustParsePrefix("10.211.0.0/24").Contains(a.IPs[0]) {
		t.Errorf("addresses %v", a.IPs)
	}
	if err := s.Detach(context.Background(), p, a, ns); err != nil {
		t.Fatal(err)
	}
	b.clean(p.ID)
	left, err := filepath.Glob(filepath.Join(b.plugin, "berth-test", "10.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("addresses left allocated: %v, %v", left, err)
	}
}

func FuzzDecodeList(f *testing.F) {
	f.Add([]byte(fakeList))
	f.Add([]byte(`{"name":"n","plugins":[{"type":"../x"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := decodeList(b)
		if err != nil {
			return
		}
		for _, p := range list.Plugins {
			if strings.Contains(p.Network.Type, "/") {
				t.Fatalf("type %q was accepted", p.Network.Type)
			}
		}
	})
}
