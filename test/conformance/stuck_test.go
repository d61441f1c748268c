package conformance

import (
	"bytes"
	enc "encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/pace"
)

// slack is what a stop may take beyond its grace when processes do not end.
const slack = 2 * time.Second

// deadMount mounts a file system whose server answers nothing about the file
// "dead" in it: whoever looks it up sleeps uninterruptibly until revive is called.
func deadMount(t *testing.T) (dir string, revive func()) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("skipped: kernel without FUSE: %v", err)
	}
	dir = t.TempDir()
	err = unix.Mount("berth-dead", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40755,user_id=0,group_id=0,allow_other", fd))
	if err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse") // known to the poller only now: before the mount it says nothing
	var wg sync.WaitGroup
	wg.Go(func() { serveDead(dev) })
	revive = sync.OnceFunc(func() {
		dev.Close() // the kernel ends every request with ENOTCONN
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		wg.Wait()
	})
	t.Cleanup(revive)
	return dir, revive
}

// serveDead speaks the kernel's FUSE protocol (linux/fuse.h) as far as a folder
// with nothing in it needs.
func serveDead(dev *os.File) {
	const (
		lookup, forget, getattr, initialise, interrupt, batchForget = 1, 2, 3, 26, 36, 42
		headerLen                                                   = 40
	)
	buf := make([]byte, 1<<20)
	for {
		n, err := dev.Read(buf)
		if err != nil || n < headerLen {
			return
		}
		opcode, unique := enc.NativeEndian.Uint32(buf[4:]), enc.NativeEndian.Uint64(buf[8:])
		var body []byte
		errno := unix.Errno(0)
		switch opcode {
		case forget, batchForget, interrupt:
			continue
		case lookup:
			if name, _, _ := bytes.Cut(buf[headerLen:n], []byte{0}); string(name) == "dead" {
				continue
			}
			errno = unix.ENOENT
		case initialise:
			body = make([]byte, 64)
			enc.NativeEndian.PutUint32(body[0:], 7)
			enc.NativeEndian.PutUint32(body[4:], 31)
			enc.NativeEndian.PutUint32(body[20:], 4096) // max_write
		case getattr:
			body = make([]byte, 104)
			enc.NativeEndian.PutUint64(body[0:], 3600)     // seconds that it is valid
			enc.NativeEndian.PutUint64(body[16:], 1)       // inode
			enc.NativeEndian.PutUint32(body[76:], 0o40755) // mode
			enc.NativeEndian.PutUint32(body[80:], 2)       // links
		default:
			errno = unix.ENOSYS
		}
		out := enc.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
		out = enc.NativeEndian.AppendUint32(out, uint32(-int32(errno)))
		out = append(enc.NativeEndian.AppendUint64(out, unique), body...)
		if _, err := dev.Write(out); err != nil {
			return
		}
	}
}

// timed says how long a call took.
func timed(call func() error) (time.Duration, error) {
	began := time.Now()
	err := call()
	return time.Since(began), err
}

// TestStuckInADeadFileSystem: a container whose process sleeps uninterruptibly in
// a volume that does not answer. Calls about it come back soon and say what is
// wrong, other pods notice nothing, and when the volume answers all ends well.
func TestStuckInADeadFileSystem(t *testing.T) {
	dir, revive := deadMount(t)
	neighbours := func(label string) time.Duration {
		var all []time.Duration
		for range 10 {
			took, _ := timed(func() error {
				p := preparePod(t, nil)
				r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: handler})
				if err != nil {
					t.Fatal(err)
				}
				p.id = r.PodSandboxId
				c := run(t, p, "sleep", "1000")
				if out, _, code := execSync(t, c, "/bin/echo", "here"); code != 0 || out != "here\n" {
					t.Errorf("exec beside a stuck pod: %q %d", out, code)
				}
				stop(t, c, 0)
				return nil
			})
			all = append(all, took)
		}
		slices.Sort(all)
		t.Logf("run, create, start, exec, stop %s: p50 %v", label, all[len(all)/2].Round(10*time.Microsecond))
		return all[len(all)/2]
	}
	before := neighbours("before")
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) {
		c.Args = []string{"cat", "/data/dead"}
		c.Mounts = []*cri.Mount{{HostPath: dir, ContainerPath: "/data"}}
	})
	t.Cleanup(revive) // before the pod's removal, also when the test fails
	pid := pidOf(t, c)
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); !strings.Contains(threads(pid), "request_wait_answer"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d never waits for the volume: %s", pid, threads(pid))
		}
	}
	tells := func(call string, took, limit time.Duration, err error) {
		t.Helper()
		t.Logf("%s after %v: %v", call, took.Round(time.Millisecond), err)
		wantCode(t, err, codes.Unavailable, c[:12])
		for _, word := range []string{fmt.Sprint(pid), `"prog"`, "state D", "request_wait_answer", "fuse", "/data", "berth-dead"} {
			if !strings.Contains(fmt.Sprint(err), word) {
				t.Errorf("%s does not say %q: %v", call, word, err)
			}
		}
		if limit = pace.Wait(limit); took > limit {
			t.Errorf("%s took %v, want at most %v", call, took, limit)
		}
	}
	took, err := timed(func() error {
		_, err := node.Runtime.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: c, Timeout: 1})
		return err
	})
	tells("StopContainer", took, time.Second+slack, err)
	if s := containerStatus(t, c); s.State != cri.ContainerState_CONTAINER_RUNNING || !strings.Contains(s.Message, "state D") {
		t.Errorf("status: %v %q", s.State, s.Message)
	}
	took, err = timed(func() error {
		_, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id})
		return err
	})
	tells("StopPodSandbox", took, slack, err)
	ps, err := node.Runtime.PodSandboxStatus(ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil || ps.Status.State != cri.PodSandboxState_SANDBOX_NOTREADY || !strings.Contains(ps.Info["info"], "request_wait_answer") {
		t.Errorf("pod status: %v %v %v", ps.GetStatus().GetState(), ps.GetInfo(), err)
	}
	took, err = timed(func() error {
		_, err := node.Runtime.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: c})
		return err
	})
	tells("RemoveContainer", took, slack, err)
	took, err = timed(func() error {
		_, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
		return err
	})
	tells("RemovePodSandbox", took, slack, err)
	// Far beyond noise: a lock or a queue that is shared would cost seconds.
	if after := neighbours("beside it"); after > 10*before+pace.Wait(200*time.Millisecond) {
		t.Errorf("neighbours took %v before and %v beside a stuck pod", before, after)
	}
	revive()
	waitExit(t, c)
	stop(t, c, 0)
	neighbours("after")
	if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("stop of the pod after the volume came back: %v", err)
	}
}

// threads tells what the threads of a process wait in.
func threads(pid int) string {
	var out []string
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/wchan", pid))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		out = append(out, string(b))
	}
	return strings.Join(out, " ")
}

// TestStopOfTheDeafAndTheFrozen: neither can refuse SIGKILL.
func TestStopOfTheDeafAndTheFrozen(t *testing.T) {
	p := runPod(t, nil)
	deaf := run(t, p, "signal-ignore")
	waitLog(t, deaf, "ready")
	took, err := timed(func() error {
		_, err := node.Runtime.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: deaf, Timeout: 1})
		return err
	})
	if limit := pace.Wait(time.Second + slack); err != nil || took < time.Second || took > limit {
		t.Errorf("a deaf one: %v after %v", err, took)
	}
	if s := containerStatus(t, deaf); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
		t.Errorf("a deaf one: %v code %d", s.State, s.ExitCode)
	}
	frozen := run(t, p, "sleep", "1000")
	thaw := freeze(t, pidOf(t, frozen))
	defer thaw()
	took, err = timed(func() error {
		_, err := node.Runtime.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: frozen, Timeout: 1})
		return err
	})
	if limit := pace.Wait(time.Second + slack); err != nil || took > limit {
		t.Errorf("a frozen one: %v after %v", err, took)
	}
}

// freeze freezes the cgroup of a process.
func freeze(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || !strings.Contains(f[2], "/berth/") {
			continue
		}
		for _, at := range []struct{ file, on, off string }{
			{"/sys/fs/cgroup/freezer" + f[2] + "/freezer.state", "FROZEN", "THAWED"},
			{"/sys/fs/cgroup" + f[2] + "/cgroup.freeze", "1", "0"},
		} {
			if os.WriteFile(at.file, []byte(at.on), 0) == nil {
				return func() { _ = os.WriteFile(at.file, []byte(at.off), 0) }
			}
		}
	}
	t.Fatalf("no freezer for %s", b)
	return nil
}

// TestStopOfAForkBomb: no process escapes the kill by being forked meanwhile.
func TestStopOfAForkBomb(t *testing.T) {
	parent := fmt.Sprintf("/berth-e2e-bomb-%d", os.Getpid())
	limited := false
	for _, h := range hierarchies(t) {
		dir := filepath.Join(h, parent)
		if os.Mkdir(dir, 0o755) == nil {
			t.Cleanup(func() { _ = unix.Rmdir(dir) })
			limited = os.WriteFile(filepath.Join(dir, "pids.max"), []byte("150"), 0) == nil || limited
		}
	}
	if !limited {
		t.Fatal("no pids controller: nothing would bound it")
	}
	p := runPod(t, func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	c := run(t, p, "fork-endlessly")
	waitLog(t, c, "forking")
	time.Sleep(300 * time.Millisecond)
	took, err := timed(func() error {
		_, err := node.Runtime.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: c, Timeout: 1})
		return err
	})
	t.Logf("stopped after %v", took.Round(time.Millisecond))
	if limit := pace.Wait(time.Second + slack); err != nil || took > limit {
		t.Errorf("%v after %v", err, took)
	}
	if _, err := node.Runtime.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: c}); err != nil {
		t.Error(err)
	}
	for _, h := range hierarchies(t) {
		if b, _ := os.ReadFile(filepath.Join(h, parent, c, "cgroup.procs")); len(b) > 0 {
			t.Errorf("processes are left in %s: %s", h, b)
		}
	}
}
