package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/pace"
)

// tally counts what a run of many lives has lost.
type tally struct {
	lives, codes, lines, other atomic.Int64
}

func (c *tally) add(t *testing.T, l *life, err error) {
	switch {
	case err == nil:
		c.lives.Add(1)
		return
	case errors.Is(err, errCode):
		c.codes.Add(1)
	case errors.Is(err, errLines):
		c.lines.Add(1)
	default:
		c.other.Add(1)
	}
	t.Errorf("%s: %v", l.pod.Metadata.Name, err)
}

func (c *tally) String() string {
	return fmt.Sprintf("%d lives, %d lost exit codes, %d lost lines, %d permanent failures", c.lives.Load(), c.codes.Load(), c.lines.Load(), c.other.Load())
}

// crowd are the kinds of lives under load.
var crowd = append([]kind{{name: "own image", stages: whole, port: true}}, kinds[1:4]...)

// TestKilledUnderLoad kills the daemon every 2 s while pods of all kinds come and go.
func TestKilledUnderLoad(t *testing.T) {
	want, limit := int64(1)<<62, 14*time.Second
	if long {
		want, limit = 2000, time.Hour
	}
	n := newNode(t, nil)
	w := newWitness(t, n)
	n.warm(t)
	before := n.standing(t)
	var c tally
	var wg sync.WaitGroup
	over, kills := time.Now().Add(limit), 0
	done := func() bool { return c.lives.Load() >= want || time.Now().After(over) || t.Failed() }
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; !done(); i++ {
				l, err := newLife(n, crowd[i%len(crowd)])
				if err != nil {
					t.Error(err)
					return
				}
				c.add(t, l, l.whole())
			}
		})
	}
	for !done() {
		time.Sleep(2 * time.Second)
		if err := n.Kill(syscall.SIGKILL); err != nil {
			t.Error(err)
			break
		}
		kills++
		n.noteRecords()
		if err := n.Start(context.Background()); err != nil {
			t.Error(err)
			break
		}
	}
	wg.Wait()
	left := n.left(t, before)
	w.check(t)
	t.Logf("%d kills of the daemon, %v, %d things left", kills, &c, left)
}

// whole lives a life to its end.
func (l *life) whole() error {
	for _, s := range l.kind.stages {
		if err := l.insist(s); err != nil {
			return l.abandon(err)
		}
	}
	return nil
}

// warm lives a life of each kind, so that what the first one makes is there.
func (n *node) warm(t *testing.T) {
	t.Helper()
	for _, k := range crowd {
		l, err := newLife(n, k)
		if err == nil {
			err = l.whole()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	n.removeCgroups()
}

// left restarts the daemon, whose start sweeps, and counts what is too much then.
func (n *node) left(t *testing.T, before standing) int {
	t.Helper()
	if err := n.Kill(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	n.start(t)
	if err := n.nothingBeyond(before); err != nil {
		t.Error(err)
	}
	rest, err := n.beyond(before)
	if err != nil {
		t.Error(err)
	}
	return len(rest)
}

// TestALogAcrossKills: the numbers that a container counts are in its log, each
// once and in order, whoever was killed meanwhile, and its exit code is known.
func TestALogAcrossKills(t *testing.T) {
	daemons, supervisors := 5, 3
	if long {
		daemons, supervisors = 50, 20
	}
	n := newNode(t, nil)
	l, err := newLife(n, kind{name: "counter"})
	if err != nil {
		t.Fatal(err)
	}
	counting := stage{"CreateContainer", func(l *life, ctx context.Context) (err error) {
		l.main, err = l.create(ctx, l.containerConfig("counter", "count", "1000000000", "200"))
		return err
	}}
	for _, s := range []stage{runPod, counting, startMain} {
		if err := l.insist(s); err != nil {
			t.Fatal(err)
		}
	}
	// One process at a time: what both hold is lost when both are gone. An exec goes
	// through both.
	whole := func() {
		if err := l.insist(exec); err != nil {
			t.Fatal(err)
		}
	}
	rest := []int{daemons, supervisors}
	for rest[0]+rest[1] > 0 {
		time.Sleep(time.Duration(20+rand.IntN(300)) * time.Millisecond)
		if rand.IntN(rest[0]+rest[1]) < rest[0] {
			rest[0]--
			if err := n.Kill(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
			n.start(t)
			whole()
			continue
		}
		rest[1]--
		if err := syscall.Kill(n.SupervisorPid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		whole()
	}
	if err := l.insist(stage{"the container", (*life).remember}); err != nil {
		t.Error(err)
	}
	s, err := n.Runtime.ContainerStatus(context.Background(), &cri.ContainerStatusRequest{ContainerId: l.main})
	if err != nil {
		t.Fatal(err)
	}
	// It does not hear of SIGTERM: the log must hold what it wrote until the very end.
	if err := l.insist(killMain); err != nil {
		t.Error(err)
	}
	log, err := os.ReadFile(s.Status.LogPath)
	if err != nil {
		t.Fatal(err)
	}
	if err := gapless(s.Status.LogPath, -1); err != nil {
		t.Error(err)
	}
	t.Logf("%d kills of the daemon, %d of the supervisor, log of %d KiB", daemons, supervisors, len(log)>>10)
	if err := l.insist(removePod); err != nil {
		t.Error(err)
	}
}

// impatient is how a client limits a call.
type impatient func() (context.Context, context.CancelFunc)

// TestAStormOfShortDeadlines makes 1,000 calls that wait 100 ms each, again and
// again until they succeed.
func TestAStormOfShortDeadlines(t *testing.T) {
	storm(t, 1000, 24, func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.Background(), 100*time.Millisecond)
	})
}

// TestClientsThatCancelAtRandom is the same with calls that are cancelled at any moment.
func TestClientsThatCancelAtRandom(t *testing.T) {
	storm(t, 1000, 8, func() (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Duration(rand.IntN(30_000))*time.Microsecond, cancel)
		return ctx, cancel
	})
}

// storm lives pods with impatient calls until so many were made. In between, each
// pod and container is there once.
func storm(t *testing.T, calls int64, workers int, limit impatient) {
	n := newNode(t, nil)
	n.warm(t)
	before := n.standing(t)
	var c tally
	var made, cut, doubles atomic.Int64
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			for i := worker; made.Load() < calls && !t.Failed(); i++ {
				l, err := newLife(n, crowd[i%len(crowd)])
				if err != nil {
					t.Error(err)
					return
				}
				for _, s := range l.kind.stages {
					if err = repeat(l, s, limit, &made, &cut); err != nil {
						err = l.abandon(fmt.Errorf("%s: %w", s.name, err))
						break
					}
					if s.name == startMain.name {
						doubles.Add(int64(l.doubles(t)))
					}
				}
				c.add(t, l, err)
			}
		})
	}
	wg.Wait()
	left := n.left(t, before)
	t.Logf("%d calls, %d of them cut off, %v, %d doubles, %d things left", made.Load(), cut.Load(), &c, doubles.Load(), left)
	if doubles.Load() > 0 {
		t.Error("something was made twice")
	}
	if cut.Load() == 0 {
		t.Error("no call was cut off: this was no storm")
	}
}

// repeat makes a call until it succeeds in time.
func repeat(l *life, s stage, limit impatient, made, cut *atomic.Int64) error {
	for deadline := time.Now().Add(pace.Wait(time.Minute)); ; {
		ctx, cancel := limit()
		err := s.call(l, ctx)
		cancel()
		made.Add(1)
		switch code := status.Code(err); {
		case err == nil:
			return nil
		case code == codes.DeadlineExceeded, code == codes.Canceled, errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
			cut.Add(1)
		default:
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after a minute of trying: %w", err)
		}
	}
}

// doubles counts pods and containers of a life that are there more than once.
func (l *life) doubles(t *testing.T) int {
	ctx := context.Background()
	pods, err := l.n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Error(err)
		return 0
	}
	containers, err := l.n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: l.podID}})
	if err != nil {
		t.Error(err)
		return 0
	}
	found := map[string]int{}
	for _, p := range pods.Items {
		if p.Metadata.Uid == l.pod.Metadata.Uid {
			found["pod"]++
		}
	}
	for _, c := range containers.Containers {
		found["container "+c.Metadata.Name]++
	}
	n := 0
	for what, c := range found {
		if c > 1 {
			t.Errorf("%s: %d times %s", l.pod.Metadata.Name, c, what)
			n += c - 1
		}
	}
	return n
}
