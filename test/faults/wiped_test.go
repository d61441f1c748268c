package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// wipe deletes the state folder below the running daemon, as a careless clean-up
// of /run does: with the folder, or only what is in it.
func (n *node) wipe(folder bool) {
	n.t.Helper()
	state := filepath.Join(n.Dir, "run")
	// Pins are mounts: a clean-up in another mount namespace takes them along.
	for _, p := range append(glob(n.t, filepath.Join(state, "cni/netns/*")), filepath.Join(state, "cni/netns")) {
		for unix.Unmount(p, unix.MNT_DETACH) == nil {
		}
	}
	for try := 0; ; try++ { // what is made anew meanwhile is in the way
		err := os.RemoveAll(state)
		if err == nil {
			break
		}
		if try > 100 {
			n.t.Fatal(err)
		}
	}
	if !folder {
		if err := os.MkdirAll(state, 0o700); err != nil {
			n.t.Fatal(err)
		}
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	out, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// reachable waits until a client that connects anew is served, and until a new
// daemon would find the supervisor.
func (n *node) reachable(supervisor int) {
	n.t.Helper()
	n.eventually("a new client is served", func() bool {
		conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			n.t.Fatal(err)
		}
		defer conn.Close()
		_, err = cri.NewRuntimeServiceClient(conn).Version(n.ctx(), &cri.VersionRequest{})
		return err == nil
	})
	n.eventually("the supervisor's socket and lock are back", func() bool {
		_, err := os.Stat(filepath.Join(n.Dir, "run/supervisor.sock"))
		return err == nil && n.SupervisorPid() == supervisor
	})
}

// TestStateFolderWiped: with /run wiped below it the daemon says so and goes on:
// running containers do not notice, new pods and containers can be made, and a
// restart finds the same supervisor, containers, addresses and ports.
func TestStateFolderWiped(t *testing.T) {
	for _, folder := range []bool{true, false} {
		for _, network := range []string{"built-in", "plugin"} {
			t.Run(fmt.Sprintf("%s, folder=%v", network, folder), func(t *testing.T) {
				var n *node
				var dir string
				if network == "plugin" {
					n, dir = plugged(t)
				} else {
					n = started(t)
				}
				c := n.PodConfig()
				if network == "built-in" {
					c.PortMappings = []*cri.PortMapping{{ContainerPort: 8080, HostPort: 18778}}
				}
				p := &pod{config: c}
				var err error
				if p.id, err = n.tryPod(c); err != nil {
					t.Fatal(err)
				}
				keep, made, ip := n.run(p, "serve", ":8080"), n.create(p, "sleep", "1000"), n.ip(p)
				supervisor := n.SupervisorPid()
				served := func(when string) {
					t.Helper()
					n.ready()
					n.alive(keep)
					if network != "built-in" {
						return
					}
					for _, at := range []string{ip + ":8080", "127.0.0.1:18778"} {
						if err := answers(at); err != nil {
							t.Errorf("%s: %s: %v", when, at, err)
						}
					}
				}
				n.wipe(folder)
				n.reachable(supervisor)
				n.says("State folder was wiped")
				served("after the wipe")
				if err := n.tryStart(made); err != nil {
					t.Errorf("start of one that was made before: %v", err)
				}
				n.alive(made)
				again := n.run(p, "sleep", "1000")
				if out, err := n.exec(again, "/bin/cat", "/etc/hosts"); err != nil || !strings.Contains(out, ip) {
					t.Errorf("hosts of a new container in the old pod: %q, %v", out, err)
				}
				fresh := n.pod()
				n.alive(n.run(fresh, "sleep", "1000"))

				n.wipe(folder)
				n.reachable(supervisor)
				for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
					if err := n.Kill(sig); err != nil {
						t.Fatal(err)
					}
					n.up()
					served(fmt.Sprint("after ", sig))
					n.alive(again)
					if got := n.SupervisorPid(); got != supervisor {
						t.Errorf("%v: supervisor %d, was %d", sig, got, supervisor)
					}
					q := n.pod()
					if got := n.ip(q); got == ip || got == n.ip(fresh) {
						t.Errorf("the address %s was given out again", got)
					}
					n.removePod(q.id)
				}
				n.removePod(p.id)
				n.removePod(fresh.id)
				if dir != "" {
					nothingOf(n, dir)
				}
			})
		}
	}
}

// TestStateFolderWipedWhileDown: nobody can tell the supervisor's containers from
// here but the supervisor, which makes its socket anew.
func TestStateFolderWipedWhileDown(t *testing.T) {
	n := started(t)
	p := n.pod()
	c, supervisor := n.run(p, "sleep", "1000"), n.SupervisorPid()
	if err := n.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.wipe(true)
	n.eventually("the supervisor's socket is back", func() bool { return n.SupervisorPid() == supervisor })
	time.Sleep(50 * time.Millisecond) // lock, then socket
	n.up()
	n.alive(c)
	n.ready()
	n.alive(n.run(n.pod(), "sleep", "1000"))
	n.removePod(p.id)
}
