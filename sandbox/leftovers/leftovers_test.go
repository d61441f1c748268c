package leftovers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/test/pace"
)

// place is a node's folders and cgroups with nothing in them, and its records.
type place struct {
	Places
	t          *testing.T
	pods       map[id.Pod]bool
	containers map[id.Container]bool
	kept       map[string]bool
	running    []Running
	logFiles   []string
	ended      map[id.Container]bool
	silence    func(context.Context, id.Container) error
}

func newPlace(t *testing.T) *place {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("skipped: needs root: makes cgroups and mounts")
	}
	dir := t.TempDir()
	p := &place{t: t, pods: map[id.Pod]bool{}, containers: map[id.Container]bool{}, kept: map[string]bool{}}
	p.Places = Places{Pods: filepath.Join(dir, "state", "pods"), Layers: filepath.Join(dir, "root", "containers"), Records: filepath.Join(dir, "root", "sandboxes"),
		State: filepath.Join(dir, "state"), Parent: "/berth-leftovers-test-" + strconv.Itoa(os.Getpid())}
	p.mkdir(p.Pods)
	for _, s := range "0123456789abcdef" {
		p.mkdir(filepath.Join(p.Layers, string(s)))
	}
	var err error
	if p.Past, err = OpenPast(filepath.Join(p.State, PastFile)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Past.Close() })
	p.Cgroups = hierarchies(t)
	t.Cleanup(func() {
		for _, h := range p.Cgroups {
			_ = walk(filepath.Join(h, p.Parent), func(dir string) error { return unix.Rmdir(dir) })
		}
	})
	return p
}

// hierarchies are two cgroup file systems of this machine, or the one it has.
func hierarchies(t *testing.T) (out []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 3 && (f[2] == "cgroup2" || f[2] == "cgroup" && (strings.Contains(f[3], "pids") || strings.Contains(f[3], "freezer"))) {
			out = append(out, f[1])
		}
	}
	if len(out) == 0 {
		t.Fatal("no cgroup file system")
	}
	return out
}

func (p *place) mkdir(path string) string {
	p.t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		p.t.Fatal(err)
	}
	return path
}

func (p *place) write(path string) string {
	p.t.Helper()
	p.mkdir(filepath.Dir(path))
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return path
}

// cgroup makes a cgroup in all hierarchies, with a process in one below it.
func (p *place) cgroup(path string, inside ...string) (pid int) {
	p.t.Helper()
	leaf := filepath.Join(append([]string{path}, inside...)...)
	for _, h := range p.Cgroups {
		p.mkdir(filepath.Join(h, leaf))
	}
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	p.t.Cleanup(func() { _ = cmd.Process.Kill(); <-done })
	for _, h := range p.Cgroups {
		if err := os.WriteFile(filepath.Join(h, leaf, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			p.t.Fatal(err)
		}
	}
	return cmd.Process.Pid
}

func (p *place) records() Records {
	return Records{
		Pod:        func(q id.Pod) bool { return p.pods[q] },
		Container:  func(c id.Container) bool { return p.containers[c] },
		Containers: func() map[id.Container]bool { return p.containers },
		Ended:      func(c id.Container) bool { return p.ended[c] },
		Silence:    p.silence,
		Keeps:      func(key string) bool { return p.kept[key] },
		Running:    func() []Running { return p.running },
		Logs:       func() []string { return p.logFiles },
	}
}

func (p *place) look() []leftover.Finding {
	p.t.Helper()
	found, err := Look(context.Background(), p.Places, p.records())
	if err != nil {
		p.t.Fatal(err)
	}
	leftover.Sort(found)
	return found
}

// want compares what is found, by kind and name, with what is to be; of what can
// be removed the name ends with "!".
func (p *place) want(what ...string) []leftover.Finding {
	p.t.Helper()
	found := p.look()
	var got []string
	for _, f := range found {
		name := string(f.Kind) + " " + f.Name
		if f.Remove != nil {
			name += "!"
		} else if f.Remedy == "" {
			p.t.Errorf("%s: neither removed nor a remedy", name)
		}
		got = append(got, name)
	}
	slices.Sort(got)
	slices.Sort(what)
	if !slices.Equal(got, what) {
		p.t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(what, "\n"))
	}
	return found
}

func (p *place) remove(found []leftover.Finding) {
	p.t.Helper()
	for _, f := range found {
		if f.Remove == nil {
			continue
		}
		if err := f.Remove(context.Background()); err != nil {
			p.t.Errorf("%s %s: %v", f.Kind, f.Name, err)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func alive(pid int) bool { return inCgroup(pid, "/") || exists(fmt.Sprintf("/proc/%d/exe", pid)) }

// TestCgroups: the cgroup of a forgotten container is found with the processes in
// and below it; those of a container on record, of a neighbour whose name begins the
// same, and of another program stay.
func TestCgroups(t *testing.T) {
	p := newPlace(t)
	dead, live, other := id.NewContainer(), id.NewContainer(), id.NewContainer()
	p.containers[live] = true
	at := func(c id.Container) string { return p.Parent + "/kubepods/" + string(c) }
	deadPid, livePid, otherPid := p.cgroup(at(dead), "inner", "deeper"), p.cgroup(at(live)), p.cgroup(at(other))
	likePid := p.cgroup(at(dead) + "0")
	for _, c := range []id.Container{dead, live} { // other is not of Berth's past
		if err := p.Past.Add(string(c), at(c)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		p.want("process "+strconv.Itoa(deadPid)+"!", "cgroup "+at(dead)+"!")
	}
	// It is on record again by the time it would be removed: nothing happens.
	found := p.look()
	p.containers[dead] = true
	for _, f := range found {
		if f.Kind == leftover.Cgroup {
			p.remove([]leftover.Finding{f})
		}
	}
	delete(p.containers, dead)
	if !exists(filepath.Join(p.Cgroups[0], at(dead))) || !alive(deadPid) {
		t.Fatal("what is on record was removed")
	}
	p.remove(p.look())
	for _, h := range p.Cgroups {
		if exists(filepath.Join(h, at(dead))) {
			t.Errorf("%s%s is left", h, at(dead))
		}
		for _, c := range []string{at(live), at(other), at(dead) + "0"} {
			if !exists(filepath.Join(h, c)) {
				t.Errorf("%s%s is gone", h, c)
			}
		}
	}
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); alive(deadPid); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the process of a forgotten container lives")
		}
	}
	for _, pid := range []int{livePid, otherPid, likePid} {
		if !alive(pid) {
			t.Errorf("process %d of somebody else was killed", pid)
		}
	}
	p.want()
	if l := p.Past.List(); len(l) != 1 || l[0].ID != string(live) {
		t.Errorf("remembered %v", l)
	}
}

// TestUnprovedCgroups: below our own parent what nobody knows is reported only.
func TestUnprovedCgroups(t *testing.T) {
	p := newPlace(t)
	known, unknown := id.NewPod(), id.NewPod()
	p.pods[known] = true
	p.cgroup(p.Parent + "/" + string(known) + "/x")
	pid := p.cgroup(p.Parent + "/" + string(unknown) + "/x")
	p.cgroup(p.Parent + "/theirs")
	if (&look{Places: p.Places}).othersRun() {
		p.want() // they may be that one's
		return
	}
	p.want("cgroup "+p.Parent+"/"+string(unknown), "process "+strconv.Itoa(pid))
}

// TestMountsBelowAnIDOfAnother: the daemon's folders are in one that is named by an
// id, as a volume of another runtime is. Mounts belong to whom they belonged anyway.
func TestMountsBelowAnIDOfAnother(t *testing.T) {
	p := newPlace(t)
	live, dead := id.NewContainer(), id.NewContainer()
	p.containers[live] = true
	p.Layers = p.mkdir(filepath.Join(filepath.Dir(p.State), string(id.NewPod()), "containers"))
	var at []string
	for _, c := range []id.Container{live, dead} {
		dir := p.mkdir(filepath.Join(p.Layers, string(c[:1]), string(c), "rootfs"))
		if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		at = append(at, dir)
	}
	p.want("mount "+at[0], "mount "+at[1]+"!", "layer "+filepath.Dir(at[1])+"!")
}

// TestFolders: pod files and layers of nobody are found, and what is mounted in them
// is taken off first and never emptied.
func TestFolders(t *testing.T) {
	p := newPlace(t)
	livePod, deadPod, live, dead := id.NewPod(), id.NewPod(), id.NewContainer(), id.NewContainer()
	p.pods[livePod], p.containers[live] = true, true
	layer := func(c id.Container) string { return filepath.Join(p.Layers, string(c[:1]), string(c)) }
	keep := []string{
		p.write(filepath.Join(p.Pods, string(livePod), "hosts")), p.write(filepath.Join(p.Pods, "notes")),
		p.write(filepath.Join(layer(live), "upper", "file")), p.mkdir(filepath.Join(p.Layers, "lost+found")), p.mkdir(filepath.Join(p.Layers, "a", "mine")),
	}
	p.write(filepath.Join(p.Pods, string(deadPod), "hosts"))
	p.write(filepath.Join(layer(dead), "upper", "file"))
	volume := p.write(filepath.Join(t.TempDir(), "volume", "precious"))
	bind := func(at string) {
		t.Helper()
		if err := unix.Mount(filepath.Dir(volume), p.mkdir(at), "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	}
	inDead, inLive, operators := filepath.Join(layer(dead), "rootfs"), filepath.Join(layer(live), "rootfs"), filepath.Join(p.Layers, "b", "disk")
	bind(inDead)
	bind(inLive)
	bind(operators)
	var found []leftover.Finding
	for range 2 {
		found = p.want("mount "+inDead+"!", "mount "+inLive, "layer "+layer(dead)+"!", "pod-files "+filepath.Join(p.Pods, string(deadPod))+"!")
	}
	i := slices.IndexFunc(found, func(f leftover.Finding) bool { return f.Kind == leftover.Layer })
	if err := found[i].Remove(context.Background()); err == nil || !strings.Contains(err.Error(), inDead) {
		t.Errorf("a layer with a mount in it: %v", err)
	}
	if !exists(volume) {
		t.Fatal("a mounted volume was emptied")
	}
	p.remove(found)
	p.want("mount " + inLive)
	for _, k := range append(keep, volume, filepath.Join(inLive, "precious"), filepath.Join(operators, "precious")) {
		if !exists(k) {
			t.Errorf("%s is gone", k)
		}
	}
	if exists(layer(dead)) || exists(filepath.Join(p.Pods, string(deadPod))) {
		t.Error("a leftover is still there")
	}
}

// fakeSupervisor has containers and descriptors.
type fakeSupervisor struct {
	list    []wire.Info
	keys    []string
	deleted []id.Container
	dropped []string
}

func (s *fakeSupervisor) List(context.Context) ([]wire.Info, error) { return s.list, nil }
func (s *fakeSupervisor) Delete(_ context.Context, c id.Container) error {
	s.deleted = append(s.deleted, c)
	s.list = slices.DeleteFunc(s.list, func(i wire.Info) bool { return i.ID == c })
	return nil
}
func (s *fakeSupervisor) ListFDs(context.Context) ([]string, error) { return s.keys, nil }
func (s *fakeSupervisor) DropFDs(_ context.Context, keys []string) error {
	s.dropped = append(s.dropped, keys...)
	s.keys = slices.DeleteFunc(s.keys, func(k string) bool { return slices.Contains(keys, k) })
	return nil
}

func TestSupervisor(t *testing.T) {
	p := newPlace(t)
	pod, gone := id.NewPod(), id.NewPod()
	live, dead, lost, ended, undead := id.NewContainer(), id.NewContainer(), id.NewContainer(), id.NewContainer(), id.NewContainer()
	s := &fakeSupervisor{
		list: []wire.Info{{ID: live, State: wire.Running}, {ID: dead, State: wire.Created}, {ID: ended, State: wire.Exited}, {ID: undead, State: wire.Running, Pid: 77}},
		keys: []string{string(pod) + "/net", string(gone) + "/net", "somebody's"},
	}
	p.Supervisor = s
	p.kept[s.keys[0]] = true
	for _, c := range []id.Container{live, lost, ended} {
		p.containers[c] = true
		p.running = append(p.running, Running{ID: c})
	}
	descriptor, container := "descriptor "+string(gone)+"/net!", "container "+string(dead)+"!"
	p.containers[undead], p.ended = true, map[id.Container]bool{undead: true}
	p.want(descriptor, container, "lost "+string(lost), "process 77") // offline: the next daemon reads the end
	settled := map[id.Container]bool{}
	for i := range p.running {
		p.running[i].Settle = func(_ context.Context, known *wire.Info) error {
			settled[p.running[i].ID] = known != nil
			return nil
		}
	}
	var silenced []id.Container
	p.silence = func(_ context.Context, c id.Container) error { silenced = append(silenced, c); return nil }
	found := p.want(descriptor, container, "lost "+string(lost)+"!", "lost "+string(ended)+"!", "process 77!")
	if len(s.deleted)+len(s.dropped) > 0 {
		t.Fatal("looking removed something")
	}
	p.remove(found)
	if !slices.Equal(s.deleted, []id.Container{dead}) || !slices.Equal(s.dropped, []string{string(gone) + "/net"}) {
		t.Errorf("deleted %v, dropped %v", s.deleted, s.dropped)
	}
	if !slices.Equal(silenced, []id.Container{undead}) {
		t.Errorf("silenced %v", silenced)
	}
	if known, ok := settled[lost]; !ok || known || !settled[ended] || len(settled) != 2 {
		t.Errorf("settled %v", settled)
	}
	// Without a supervisor the kernel is asked.
	p.Supervisor = nil
	cgroup := p.Parent + "/" + string(live)
	p.running = []Running{{ID: live, Pid: p.cgroup(cgroup), Cgroup: cgroup}, {ID: lost, Pid: os.Getpid(), Cgroup: p.Parent + "/" + string(lost)}}
	p.pods[id.Pod(live)] = true // its cgroup is directly below the parent here
	p.want("lost " + string(lost))
}

// TestLogs: this process stands for the supervisor.
func TestLogs(t *testing.T) {
	p := newPlace(t)
	p.SupervisorPid = os.Getpid()
	dir := t.TempDir()
	open := func(name string) string {
		t.Helper()
		path := p.write(filepath.Join(dir, name))
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return path
	}
	live := open("live.log")
	rotated := open("rotated.log")
	deleted := open("deleted.log")
	stray := open("stray.log")
	open("no-log.txt")
	p.logFiles = []string{live, rotated, deleted}
	if err := os.Rename(rotated, rotated+".20300101-000000"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(deleted); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "logs")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	p.logFiles[0] = filepath.Join(link, "live.log")
	p.want("log " + stray)
	if err := os.Remove(stray); err != nil {
		t.Fatal(err)
	}
	p.want("log " + stray + " (deleted)")
}

func TestSetAsideAndBundles(t *testing.T) {
	p := newPlace(t)
	live := id.NewContainer()
	p.containers[live] = true
	bad := p.write(filepath.Join(p.Records, "pods", string(id.NewPod())+".json.bad"))
	p.write(filepath.Join(p.Records, "containers", string(id.NewContainer())+".json"))
	bundle := p.mkdir(filepath.Join(p.State, "external", "runc", "bundles", string(id.NewContainer())))
	p.mkdir(filepath.Join(p.State, "external", "runc", "bundles", string(live)))
	p.want("record "+bad, "bundle "+bundle)
}

// TestPast: objects are remembered across daemons, a line that was cut short is not
// one, and the file does not grow without end.
func TestPast(t *testing.T) {
	file := filepath.Join(t.TempDir(), PastFile)
	open := func() *Past {
		t.Helper()
		p, err := OpenPast(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		return p
	}
	add := func(p *Past, name, cgroup string) {
		t.Helper()
		if err := p.Add(name, cgroup); err != nil {
			t.Fatal(err)
		}
	}
	a, b := string(id.NewContainer()), string(id.NewContainer())
	p := open()
	add(p, a, "/kubepods/pod 1/"+a)
	for name, cgroup := range map[string]string{b: "/kubepods", "x": "/kubepods/x", "": "/"} { // not its own
		add(p, name, cgroup)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString("\n123 " + b + " /x/" + b[:10])
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	p = open()
	add(p, b, "/kubepods/"+b)
	for _, p := range []*Past{p, open()} {
		if l := p.List(); len(l) != 2 || l[0].Cgroup != "/kubepods/pod 1/"+a || l[1].ID != b {
			t.Errorf("%+v", l)
		}
	}
	for range 3 * maxLines {
		c := string(id.NewContainer())
		add(p, c, "/kubepods/"+c)
		l := p.List()
		if err := p.Drop(map[Object]bool{l[len(l)-1]: true}); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(file); err != nil || st.Size() > 3*maxLines*100 {
		t.Errorf("%v, %v", st.Size(), err)
	}
	if l := open().List(); len(l) < 2 || l[0].ID != a || l[1].ID != b {
		t.Errorf("%d objects", len(l))
	}
	all := map[Object]bool{}
	for _, o := range p.List() {
		all[o] = true
	}
	if err := p.Drop(all); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Size() != 0 {
		t.Errorf("%v, %v", st, err)
	}
}
