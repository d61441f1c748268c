package supervisor_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/supervisor"
	"github.com/berth-runtime/berth/oci/supervisor/client"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/test/pace"
)

const role = "BERTH_TEST_ROLE"

// The test binary is also the supervisor and a client that gets killed.
func TestMain(m *testing.M) {
	switch r := os.Getenv(role); {
	case len(os.Args) > 1 && os.Args[0] == insideName:
		inside(os.Args[1:])
	case len(os.Args) == 3 && os.Args[1] == "--state":
		os.Unsetenv(role)
		serve(os.Args[2], -1)
	case len(os.Args) == 5 && os.Args[3] == "--resume":
		memfd, _ := strconv.Atoi(os.Args[4])
		serve(os.Args[2], memfd)
	case len(os.Args) == 3 && os.Args[2] == "--version":
	case r == "client":
		doomedClient()
	default:
		os.Exit(m.Run())
	}
}

func serve(state string, resume int) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	isolating, err := embedded.New(embedded.Config{Log: log})
	var s *supervisor.Server
	if err == nil {
		cfg := supervisor.Config{StateDir: state, Handlers: map[string]oci.Runtime{"": &runtime{}, "berth": isolating}, Log: log}
		if resume < 0 {
			s, err = supervisor.New(cfg)
		} else {
			s, err = supervisor.Resume(cfg, resume)
		}
	}
	if err == nil {
		err = s.Serve(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// runtime is an oci.Runtime without isolation: it forks real processes in
// sessions of their own.
type runtime struct{}

type proc struct {
	mu      sync.Mutex
	spec    *specs.Spec
	leaders []int
	deleted bool
}

func (*runtime) Create(_ context.Context, r oci.CreateRequest) (oci.Container, error) {
	switch r.Spec.Hostname {
	case "refuse":
		return nil, fmt.Errorf("hostname: refused: %w", errdefs.ErrInvalidArgument)
	case "panic":
		panic("create")
	}
	for kind, f := range r.Namespaces {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return nil, fmt.Errorf("%s: %w", kind, err)
		}
	}
	return &proc{spec: r.Spec}, nil
}

func (p *proc) run(args []string, terminal bool, s oci.Stdio) (_ oci.Process, err error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return oci.Process{}, err
	}
	defer null.Close()
	files := []uintptr{null.Fd(), null.Fd(), null.Fd()}
	for i, f := range []*os.File{s.In, s.Out, s.Err} {
		if f != nil {
			files[i] = f.Fd()
		}
	}
	pidfd := -1
	attr := &syscall.ProcAttr{Env: []string{"PATH=" + os.Getenv("PATH")}, Files: files, Sys: &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}}
	var master *os.File
	if terminal {
		var slave *os.File
		if master, slave, err = openPTY(); err != nil {
			return oci.Process{}, err
		}
		defer slave.Close()
		attr.Files = []uintptr{slave.Fd(), slave.Fd(), slave.Fd()}
		attr.Sys.Setctty = true
	}
	pid, err := syscall.ForkExec(args[0], args, attr)
	if err != nil {
		return oci.Process{}, fmt.Errorf("process.args: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	p.leaders = append(p.leaders, pid)
	p.mu.Unlock()
	return oci.Process{Pid: pid, PidFD: os.NewFile(uintptr(pidfd), "pidfd"), Console: master}, nil
}

func openPTY() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, err
	}
	sfd, err := unix.Open("/dev/pts/"+strconv.Itoa(n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return master, os.NewFile(uintptr(sfd), "pts"), nil
}

func (p *proc) Start(_ context.Context, s oci.Stdio) (oci.Process, error) {
	return p.run(p.spec.Process.Args, p.spec.Process.Terminal, s)
}

func (p *proc) Exec(_ context.Context, x *specs.Process, s oci.Stdio) (oci.Process, error) {
	return p.run(x.Args, x.Terminal, s)
}

func (p *proc) KillAll() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pid := range p.leaders {
		_ = unix.Kill(-pid, unix.SIGKILL)
	}
	return nil
}
func (p *proc) OOMKills() (uint64, error)          { return 0, nil }
func (p *proc) Update(*specs.LinuxResources) error { return nil }
func (p *proc) Pause() error                       { return nil }
func (p *proc) Resume() error                      { return nil }
func (p *proc) Delete() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deleted = true
	return nil
}

// node is a state directory whose supervisor is ended with the test.
type node struct {
	t   testing.TB
	dir string
}

func newNode(t testing.TB) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the supervisor serves uid 0 only")
	}
	n := &node{t: t, dir: t.TempDir()}
	t.Cleanup(n.end)
	return n
}

func (n *node) pid() int {
	b, err := os.ReadFile(filepath.Join(n.dir, supervisor.LockName))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return pid
}

func (n *node) open() *client.Client {
	n.t.Helper()
	c, err := client.Open(n.t.Context(), client.Config{StateDir: n.dir, Binary: os.Args[0]})
	if err != nil {
		b, _ := os.ReadFile(filepath.Join(n.dir, "supervisor.log"))
		n.t.Fatalf("%v\n%s", err, b)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

// end deletes every container, asks the supervisor to leave and waits for it.
func (n *node) end() {
	if _, err := os.Stat(filepath.Join(n.dir, supervisor.SocketName)); err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), pace.Wait(20*time.Second))
	defer cancel()
	c, err := client.Open(ctx, client.Config{StateDir: n.dir})
	if err != nil {
		return
	}
	list, _ := c.List(ctx)
	for _, i := range list {
		if err := c.Delete(ctx, i.ID); err != nil {
			n.t.Error(err)
		}
	}
	pid := n.pid()
	c.Close()
	_ = unix.Kill(pid, unix.SIGTERM)
	waitFor(n.t, "the supervisor to end", func() bool { return !alive(pid) })
	if n.t.Failed() {
		b, _ := os.ReadFile(filepath.Join(n.dir, "supervisor.log"))
		n.t.Logf("supervisor's log:\n%s", b)
	}
}

// alive is false for zombies too.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(b), ") Z ")
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("waited 10 s for %s", what)
			return
		}
	}
}

func shell(script string) *specs.Spec {
	return &specs.Spec{Process: &specs.Process{Args: []string{"/bin/sh", "-c", script}}}
}

// start makes and starts a container and returns its id and log file.
func start(t testing.TB, c *client.Client, dir string, r wire.Create) (id.Container, string) {
	t.Helper()
	r.ID = id.NewContainer()
	log := filepath.Join(dir, "logs", string(r.ID)+".log")
	if err := c.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(t.Context(), wire.Start{ID: r.ID, LogPath: log}); err != nil {
		t.Fatal(err)
	}
	return r.ID, log
}

func exitOf(t testing.TB, c *client.Client, want id.Container) wire.Exit {
	t.Helper()
	limit := time.After(pace.Wait(15 * time.Second))
	for {
		select {
		case e := <-c.Exits():
			if e.ID == want {
				return e
			}
		case <-limit:
			t.Fatal("no exit in 15 s")
		}
	}
}

// doomedClient starts a container and waits to be killed.
func doomedClient() {
	os.Unsetenv(role)
	ctx := context.Background()
	c, err := client.Open(ctx, client.Config{StateDir: os.Getenv("STATE"), Binary: os.Args[0]})
	if err == nil {
		i := id.Container(os.Getenv("ID"))
		err = c.Create(ctx, wire.Create{ID: i, Spec: shell(os.Getenv("SCRIPT"))})
		if err == nil {
			_, err = c.Start(ctx, wire.Start{ID: i, LogPath: os.Getenv("LOG")})
		}
	}
	fmt.Println("started", err)
	time.Sleep(time.Minute)
	os.Exit(1)
}
