package conformance

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/testimage"
)

// descriptors counts the open descriptors of a process by what they are.
func descriptors(t *testing.T, pid int) map[string]int {
	t.Helper()
	out, err := harness.Descriptors(pid)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func total(m map[string]int) (n int) {
	for _, v := range m {
		n += v
	}
	return n
}

// settle waits until probe is empty, which says what is too much.
func settle(t *testing.T, what string, probe func() string) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left := probe()
		if left == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: %s", what, left)
			return
		}
	}
}

// TestNothingGrows lives pods and runs execs, attaches and port-forwards, half
// of them cut off in the middle; then daemon and supervisor hold what they held
// before, and have no dead children.
func TestNothingGrows(t *testing.T) {
	round := func(pods, execs int) {
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for range pods / 2 {
					p := runPod(t, nil)
					c := run(t, p, "exit", "0")
					waitExit(t, c)
					if _, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		p := runPod(t, nil)
		c := started(t, p, func(c *cri.ContainerConfig) { c.Stdin, c.Args = true, []string{"cat"} })
		l := run(t, p, "listen", "tcp", "127.0.0.1:7979")
		waitLog(t, l, "listening")
		for i := range execs {
			execSync(t, c, "/bin/true")
			switch {
			case i%8 == 0: // an exec whose client goes away
				s := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true}), true, true, false, false)
				_ = s.conn.Close()
			case i%8 == 2: // one that is asked for and never connected to
				execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true})
			case i%8 == 4: // an attach whose client goes away
				r, err := node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true})
				if err != nil {
					t.Fatal(err)
				}
				s := open(t, r.Url, true, true, false, false)
				_, _ = io.WriteString(s.in, "x\n")
				_ = s.conn.Close()
			case i%8 == 6:
				r, err := node.Runtime.PortForward(ctx(t), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{7979}})
				if err != nil {
					t.Fatal(err)
				}
				conn := spdyDial(t, r.Url, "portforward.k8s.io")
				_ = stream(t, conn, "error", "port", "7979", "requestID", "0")
				data := stream(t, conn, "data", "port", "7979", "requestID", "0")
				_, _ = io.WriteString(data, "x")
				_ = conn.Close()
			}
		}
		if _, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
			t.Error(err)
		}
	}
	round(6, 16) // spare namespaces, connections and the like are there from now on
	time.Sleep(300 * time.Millisecond)
	supervisor := node.SupervisorPid()
	daemonFDs, supervisorFDs, files := descriptors(t, node.Pid()), descriptors(t, supervisor), traces(t)
	round(40, 120)
	for name, row := range map[string]struct {
		pid    int
		before map[string]int
	}{"daemon": {node.Pid(), daemonFDs}, "supervisor": {supervisor, supervisorFDs}} {
		// A few more are connections of the test's own client and spare namespaces.
		settle(t, name+" descriptors", func() string {
			now := descriptors(t, row.pid)
			if total(now) <= total(row.before)+6 {
				return ""
			}
			return fmt.Sprintf("%d, were %d: %v, were %v", total(now), total(row.before), now, row.before)
		})
		settle(t, name+" has dead children", func() string {
			var dead []string
			children, err := harness.Children(row.pid)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range children {
				if strings.Contains(c, " Z ") {
					dead = append(dead, c)
				}
			}
			return strings.Join(dead, ", ")
		})
	}
	settle(t, "left behind", func() string {
		var left []string
		for _, m := range traces(t).Beyond(files) {
			if !strings.HasPrefix(m, "supervisor fd net:") { // spare namespaces change places
				left = append(left, m)
			}
		}
		return strings.Join(left, "\n")
	})
}

// TestStreamsOfAKilledDaemon: open execs, attaches and port-forwards end with
// the daemon; the container goes on, and nothing of theirs stays.
func TestStreamsOfAKilledDaemon(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) { c.Stdin, c.Args = true, []string{"cat"} })
	l := run(t, p, "listen", "tcp", "127.0.0.1:7878")
	waitLog(t, l, "listening")
	execSync(t, c, "/bin/true")
	time.Sleep(200 * time.Millisecond)
	supervisor := node.SupervisorPid()
	before := descriptors(t, supervisor)
	procs := execOut(t, c, "/bin/prog", "ps")

	e := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true}), true, true, false, false)
	tty := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/prog", "sleep", "900"}, Stdin: true, Stdout: true, Tty: true}), true, true, false, true)
	r, err := node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, r.Url, true, true, false, false)
	f, err := node.Runtime.PortForward(ctx(t), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{7878}})
	if err != nil {
		t.Fatal(err)
	}
	conn := spdyDial(t, f.Url, "portforward.k8s.io")
	_ = stream(t, conn, "error", "port", "7878", "requestID", "0")
	data := stream(t, conn, "data", "port", "7878", "requestID", "0")
	buf := make([]byte, 16)
	for _, s := range []io.ReadWriter{e.in, a.in, data} {
		if _, err := io.WriteString(s, "hello\n"); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range []io.Reader{e.out, a.out, data} {
		if n, err := s.Read(buf); err != nil || string(buf[:n]) != "hello\n" {
			t.Fatalf("%q, %v", buf[:n], err)
		}
	}
	restart(t, nil)
	for _, s := range []io.Reader{e.out, tty.out, a.out, data} {
		if rest, _ := io.ReadAll(s); len(rest) > 0 {
			t.Errorf("after the daemon's end: %q", rest)
		}
	}
	if s := containerStatus(t, c); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("the container ended with its streams: %v", s)
	}
	settle(t, "processes of cut streams", func() string {
		now := execOut(t, c, "/bin/prog", "ps")
		if strings.Count(now, "\n") <= strings.Count(procs, "\n") {
			return ""
		}
		return now
	})
	settle(t, "supervisor descriptors", func() string {
		now := descriptors(t, supervisor)
		if total(now) <= total(before) {
			return ""
		}
		return fmt.Sprintf("%v, were %v", now, before)
	})
	// A new attach works: stdin was not lost with the daemon.
	r, err = node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	a = open(t, r.Url, true, true, false, false)
	defer time.AfterFunc(20*time.Second, func() { a.conn.Close() }).Stop()
	if _, err := io.WriteString(a.in, "again\n"); err != nil {
		t.Fatal(err)
	}
	if n, err := a.out.Read(buf); err != nil || string(buf[:n]) != "again\n" {
		t.Errorf("attach after the restart: %q, %v", buf[:n], err)
	}
}

// TestImagesLeaveNothing: a removed image is gone from the disk.
func TestImagesLeaveNothing(t *testing.T) {
	before := traces(t)
	ref := push(t, "leaves-nothing", testimage.Zstd)
	pullID(t, ref)
	if _, err := node.Images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	settle(t, "files of a removed image", func() string { return strings.Join(traces(t).Beyond(before), "\n") })
}
