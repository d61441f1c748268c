// Package crash kills Berth's processes: at each numbered crash point of each
// operation (package crashpoint), and at random under load. After each kill the
// call is made again as a kubelet does, the life of its pod goes on to its end,
// and then nothing may be left of it and nothing may be lost elsewhere.
//
// `go test` runs a short form; `make crash` the long one, which passes every
// point (BERTH_CRASH_LONG=1).
package crash

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/leak"
	"github.com/berth-runtime/berth/test/testimage"
)

var (
	images *testimage.Registry
	// base is the image of all pods that do not pull one themselves.
	base string
	long = os.Getenv("BERTH_CRASH_LONG") != ""
	// seed decides what the short form leaves out: other points each time.
	seed = seedOf(os.Getenv("BERTH_CRASH_SEED"))
)

func seedOf(s string) int {
	if n, err := strconv.Atoi(s); err == nil {
		return n
	}
	return int(time.Now().Unix() % 1000)
}

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Println("crash: needs root")
		os.Exit(1)
	}
	if err := harness.OwnNetwork(); err != nil {
		fmt.Println("crash:", err)
		os.Exit(1)
	}
	os.Exit(suite(m))
}

func suite(m *testing.M) int {
	fail := func(what string, err error) int {
		fmt.Printf("crash: %s: %v\n", what, err)
		return 1
	}
	var err error
	if images, err = testimage.Serve("127.0.0.1:0", nil); err != nil {
		return fail("registry", err)
	}
	defer images.Close()
	bg := context.Background()
	image, err := testimage.Program(bg, "", testimage.Gzip)
	if err != nil {
		return fail("test program", err)
	}
	if base, err = images.Push(bg, "prog:1", image); err != nil {
		return fail("push", err)
	}
	return m.Run()
}

// node is a daemon of a test, with plans for its death.
type node struct {
	*harness.Daemon
	daemon, supervisor plan
	parent             string          // cgroup of the pods that have the kubelet's
	ids                map[string]bool // of the pods that were ever on record
}

var serial atomic.Int64

// newNode starts a daemon. At the test's end, when all pods are gone, it and its
// supervisor end and must leave nothing on the machine.
func newNode(t *testing.T, prepare func(*node)) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth-crash-") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	before, err := leak.Take()
	if err != nil {
		t.Fatal(err)
	}
	d, err := harness.New(dir, "--log-level", "debug")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Daemon: d, daemon: plan(filepath.Join(dir, "berthd.plan")), supervisor: plan(filepath.Join(dir, "supervisor.plan")),
		parent: fmt.Sprintf("/berth-crash-%d", os.Getpid()), ids: map[string]bool{}}
	d.Env = []string{crashpoint.Daemon + "=" + string(n.daemon), crashpoint.Supervisor + "=" + string(n.supervisor)}
	if prepare != nil {
		prepare(n)
	}
	n.start(t)
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(n.Dir, "run", "supervisor.log"))
			t.Logf("--- end of the daemon's log\n%s\n--- end of the supervisor's log\n%s", n.LogTail(6000), log[max(0, len(log)-6000):])
		}
		n.daemon.disarm()
		n.supervisor.disarm()
		if err := n.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
		n.removeCgroups()
		if err := settle(func() ([]string, error) {
			left, err := before.Since(0)
			return slices.DeleteFunc(left, func(what string) bool { return !n.ours(what) }), err
		}); err != nil {
			t.Error(err)
		}
	})
	if _, err := n.Images.PullImage(context.Background(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: base}}); err != nil {
		t.Fatal(err)
	}
	return n
}

// ours tells whether something on the machine can be this node's: other tests may
// run beside this one.
func (n *node) ours(what string) bool {
	kind, name, _ := strings.Cut(what, ": ")
	switch kind {
	case "netns":
		return false // Berth pins none there
	case "mount":
		return strings.HasPrefix(name, n.Dir)
	case "cgroup":
		return strings.Contains(name, n.parent)
	case "process":
		pid, _, _ := strings.Cut(name, " ")
		args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
		return strings.Contains(string(args), n.Dir)
	}
	return true // links and tables are of the test's own network namespace
}

// removeCgroups removes the kubelet's cgroups, as a kubelet does. One that
// something is in stays and is found.
func (n *node) removeCgroups() {
	hierarchies, _ := harness.Hierarchies()
	for _, h := range hierarchies {
		top := filepath.Join(h, n.parent)
		pods, _ := os.ReadDir(top)
		for _, p := range pods {
			_ = os.Remove(filepath.Join(top, p.Name()))
		}
		_ = os.Remove(top)
	}
}

func (n *node) start(t *testing.T) {
	t.Helper()
	if err := n.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// plan is the file that tells a process at which point to die.
type plan string

// arm makes the process die at its nth point from now on; 0 is never.
func (p plan) arm(n int) error { return os.WriteFile(string(p), []byte(strconv.Itoa(n)), 0o600) }

// disarm reports whether the plan was still there: then nobody dies of it any more.
func (p plan) disarm() bool { return os.Remove(string(p)) == nil }

// points are the names of those passed since the last call.
func (p plan) points() []string {
	b, _ := os.ReadFile(string(p) + ".log")
	_ = os.Remove(string(p) + ".log")
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' })
}
