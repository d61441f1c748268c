package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
)

// descriptors counts the open ones of a process.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// limit changes a limit of a running process until the returned function is called.
func limit(t *testing.T, pid, what int, n uint64) (restore func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Prlimit(pid, what, nil, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(pid, what, &unix.Rlimit{Cur: n, Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := unix.Prlimit(pid, what, &old, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNoDescriptorsLeft: daemon or supervisor may open one, two, ... files more
// and no further one. Whatever call meets the limit fails as a whole, and what
// runs can still be seen, stopped and removed when there is room again.
func TestNoDescriptorsLeft(t *testing.T) {
	for _, who := range []string{"daemon", "supervisor"} {
		t.Run(who, func(t *testing.T) {
			n := started(t)
			p := n.pod()
			keep := n.run(p, "sleep", "1000")
			pid := n.Pid()
			if who == "supervisor" {
				pid = n.SupervisorPid()
			}
			before := n.tree()
			failed := 0
			for _, room := range []int{0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32} {
				restore := limit(t, pid, unix.RLIMIT_NOFILE, uint64(descriptors(t, pid)+room))
				// Work goes on after the deadline: without a connection to the supervisor
				// it waits for one.
				err, execErr := n.briefLife(), n.briefExec(keep)
				if n.container(keep).State != cri.ContainerState_CONTAINER_RUNNING {
					t.Errorf("room for %d: the running container is lost", room)
				}
				restore()
				for _, err := range []error{err, execErr} {
					if err == nil {
						continue
					}
					failed++
					if code := status.Code(err); code != codes.ResourceExhausted && code != codes.DeadlineExceeded && code != codes.Unavailable && code != codes.Unknown {
						t.Errorf("room for %d: %v", room, err)
					}
				}
				// What had begun comes to its end, and what is listed can be removed.
				n.eventually("the daemon works again", func() bool { _, err := n.exec(keep, "/bin/echo", "x"); return err == nil })
				n.eventually("nothing is half-made", func() bool {
					for id := range n.pods() {
						if id != p.id {
							_, _ = n.tryStopPod(id), n.tryRemovePod(id)
						}
					}
					return len(n.pods()) == 1 && len(n.tree()) <= len(before)
				})
				n.same(fmt.Sprintf("room for %d", room), before)
			}
			if failed < 5 {
				t.Errorf("only %d calls met the limit", failed)
			}
			n.alive(keep)
			n.alive(n.run(p, "sleep", "1000"))
			n.ready()
			n.restart()
			n.alive(keep)
		})
	}
}

// brief is for calls that may have to wait for what they will not get.
func (n *node) brief() context.Context {
	c, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	n.t.Cleanup(cancel)
	return c
}

// briefLife makes a pod with a running container.
func (n *node) briefLife() error {
	config := n.PodConfig()
	p, err := n.Runtime.RunPodSandbox(n.brief(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return err
	}
	c, err := n.Runtime.CreateContainer(n.brief(), &cri.CreateContainerRequest{PodSandboxId: p.PodSandboxId, SandboxConfig: config,
		Config: harness.ContainerConfig(prog, "sleep", "1000")})
	if err != nil {
		return err
	}
	_, err = n.Runtime.StartContainer(n.brief(), &cri.StartContainerRequest{ContainerId: c.ContainerId})
	return err
}

func (n *node) briefExec(c string) error {
	_, err := n.Runtime.ExecSync(n.brief(), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/bin/echo", "x"}})
	return err
}

// pidsCgroup makes a cgroup for processes of the test, with a limit of their number.
func pidsCgroup(t *testing.T, name string) (dir string, limit func(string)) {
	t.Helper()
	parent := "/sys/fs/cgroup/pids"
	if _, err := os.Stat(parent); err != nil {
		parent = "/sys/fs/cgroup"
	}
	dir = filepath.Join(parent, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
	})
	return dir, func(n string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "pids.max"), []byte(n), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNoProcessesLeftInThePod: the limit of the pod's cgroup, which the kubelet
// sets, is reached. The kernel refuses its programs forks and threads and not our
// moving of a process into it: what is started runs as far as it can alone, and
// nothing else notices.
func TestNoProcessesLeftInThePod(t *testing.T) {
	n := started(t)
	name := fmt.Sprintf("berth-faults-pids-%d", os.Getpid())
	_, limit := pidsCgroup(t, name)
	c := n.PodConfig()
	c.Linux.CgroupParent = "/" + name
	p := &pod{config: c}
	var err error
	if p.id, err = n.tryPod(c); err != nil {
		t.Fatal(err)
	}
	alone := func() string { // of one thread
		cfg := harness.ContainerConfig(prog)
		cfg.Command = []string{"/tiny/pause"}
		c, err := n.tryCreate(p, cfg)
		if err == nil {
			err = n.tryStart(c)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	beside := n.run(n.pod(), "sleep", "1000")
	before := alone()
	limit("1")
	during, forks := alone(), n.run(p, "fork")
	if _, err := n.exec(before, "/tiny/true"); err != nil {
		t.Errorf("exec: %v", err)
	}
	n.eventually("the one that wants threads ends", func() bool {
		s := n.container(forks)
		return s.State == cri.ContainerState_CONTAINER_EXITED && s.ExitCode != 0
	})
	for _, c := range []string{before, during} {
		if s := n.container(c); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("container of one thread: %v %s", s.State, s.Reason)
		}
	}
	n.alive(beside)
	n.ready()
	if err := n.tryStop(during, 0); err != nil {
		t.Errorf("stop: %v", err)
	}
	limit("max")
	n.alive(n.run(p, "sleep", "1000"))
	n.removePod(p.id)
	// The pod's parent is the kubelet's, which removes it.
	for _, root := range append(glob(t, "/sys/fs/cgroup/*/"+name), "/sys/fs/cgroup/"+name) {
		if err := os.Remove(root); err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
	}
}

// TestNoProcessesLeftForTheSupervisor: it may not fork any more. Starts fail as a
// whole, and work again later; what runs goes on, whether or not it survives this.
func TestNoProcessesLeftForTheSupervisor(t *testing.T) {
	n := started(t)
	p := n.pod()
	keep, made := n.run(p, "sleep", "1000"), n.create(p, "sleep", "1000")
	supervisor := n.SupervisorPid()
	limit := limitProcesses(t, supervisor)
	for range 5 { // so that the runtime has threads for what follows
		n.alive(keep)
	}
	limit("0")
	_, execErr := n.exec(keep, "/bin/echo", "x")
	startErr := n.tryStart(made)
	if n.SupervisorPid() == supervisor {
		wantErr(t, "exec", execErr, "resource temporarily unavailable")
		wantErr(t, "start", startErr, "resource temporarily unavailable")
	} else { // Go ends a process that cannot have a thread it needs; the next one takes over
		t.Logf("the supervisor has ended: exec %v, start %v", execErr, startErr)
	}
	limit("max")
	n.alive(keep)
	n.alive(n.run(p, "sleep", "1000"))
	n.ready()
	n.removePod(p.id)
}

// TestNoThreadsLeftForTheDaemon: Go ends a process that cannot have a thread it
// needs. Whether it comes to that or a call is refused: containers go on, nothing
// is half-made, and the next daemon works.
func TestNoThreadsLeftForTheDaemon(t *testing.T) {
	n := started(t)
	p := n.pod()
	keep := n.run(p, "sleep", "1000")
	limit := limitProcesses(t, n.Pid())
	before := n.tree()
	limit("0")
	refused := 0
	for range 20 {
		id, err := n.tryPod(n.PodConfig())
		if err != nil {
			refused++
			continue
		}
		if err := errors.Join(n.tryStopPod(id), n.tryRemovePod(id)); err != nil {
			refused++
		}
	}
	limit("max")
	t.Logf("%d of 20 pods were refused", refused)
	n.restart()
	n.alive(keep)
	n.ready()
	for id := range n.pods() {
		if id != p.id {
			n.removePod(id)
		}
	}
	n.eventually("nothing is half-made", func() bool { return len(n.tree()) <= len(before) })
	n.same("after the restart", before)
	n.removePod(p.id)
}

// limitProcesses moves a process into a pids cgroup of its own; the returned
// function sets the limit there. At the end it is where it was.
func limitProcesses(t *testing.T, pid int) (limit func(string)) {
	t.Helper()
	home, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	dir, limit := pidsCgroup(t, fmt.Sprintf("berth-faults-pids-%d", pid))
	back := ""
	for line := range strings.Lines(string(home)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && (f[1] == "pids" || f[1] == "" && back == "") {
			back = filepath.Join(filepath.Dir(dir), f[2], "cgroup.procs")
		}
	}
	move := func(to string) error { return os.WriteFile(to, []byte(strconv.Itoa(pid)), 0) }
	if err := move(filepath.Join(dir, "cgroup.procs")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // before the cgroup is removed
		if err := move(back); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Error(err)
		}
	})
	return limit
}
