package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/lane"
	"github.com/berth-runtime/berth/test/pace"
)

// The test binary is also the process that copies output to a log and is killed.
func TestMain(m *testing.M) {
	if os.Getenv("BERTH_TEST_ROLE") == "copier" {
		if err := copier(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Descriptors of a copier.
const (
	sourceFD  = 3 // and 4
	controlFD = 5
	lanesFD   = 6 // three for each lane
)

// copier copies two streams to a log, until their ends. It kills itself at the
// step that KILL_AT says.
func copier() error {
	c, err := net.FileConn(os.NewFile(controlFD, "control"))
	if err != nil {
		return err
	}
	control := c.(*net.UnixConn)
	killAt, _ := strconv.Atoi(os.Getenv("KILL_AT"))
	var steps atomic.Int64
	step := func() bool { return steps.Add(1) == int64(killAt) }
	die := func() {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	var acks sync.Mutex
	pool := lane.NewPool(func(l *lane.Lane) {
		acks.Lock()
		defer acks.Unlock()
		files, err := l.Files()
		if err != nil {
			die()
		}
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
			defer f.Close()
		}
		_, _, err = control.WriteMsgUnix([]byte{'l', byte(l.ID())}, unix.UnixRights(fds...), nil)
		if err == nil {
			_, err = control.Read(make([]byte, 1))
		}
		if err != nil {
			die()
		}
	}, nil, func(err error) { fmt.Fprintln(os.Stderr, err); os.Exit(1) })

	n, _ := strconv.Atoi(os.Getenv("LANES"))
	var busy []*lane.Lane
	var left [len(streamNames)]*lane.Lane
	for i := range n {
		var files []*os.File
		for j := range 3 {
			files = append(files, os.NewFile(uintptr(lanesFD+3*i+j), "lane"))
		}
		l, err := lane.Open(files)
		if err != nil {
			return err
		}
		id := l.ID()
		if pool.Add(l); l.ID() != id {
			return fmt.Errorf("lane %d became %d", id, l.ID())
		}
		name, stream, full := l.Owner()
		if !full {
			pool.Put(l)
			continue
		}
		if name != "c" || left[stream] != nil {
			return fmt.Errorf("a second lane of %s %d", name, stream)
		}
		left[stream] = l
		busy = append(busy, l)
	}
	// From here on.
	lane.Boundary = func() {
		if step() {
			die()
		}
	}
	writeFile = func(f *os.File, p []byte) (int, error) {
		lane.Boundary()
		if step() {
			_, _ = f.Write(p[:len(p)/2])
			die()
		}
		n, err := f.Write(p)
		lane.Boundary()
		return n, err
	}
	log := Adopt(os.Getenv("LOG"), func(err error) { fmt.Fprintln(os.Stderr, err) }, busy...)
	var wg sync.WaitGroup
	var streams []*Stream
	for i := range streamNames {
		streams = append(streams, log.Stream(pool, lane.Owner{Container: "c", Stream: i}, left[i]))
	}
	if os.Getenv("TOGETHER") != "" {
		for i, s := range streams {
			wg.Go(func() { follow(s, sourceFD+i) })
		}
	} else { // the same steps each time
		wg.Go(func() { follow(streams[1], sourceFD+1); follow(streams[0], sourceFD) })
	}
	ready := make(chan struct{})
	go func() {
		_, _ = control.Write([]byte{'r', 0})
		close(ready)
		for b := make([]byte, 1); ; {
			acks.Lock() // an answer is not for us
			_ = control.SetReadDeadline(time.Now().Add(time.Millisecond))
			n, err := control.Read(b)
			_ = control.SetReadDeadline(time.Time{})
			acks.Unlock()
			if n == 1 {
				if err := log.Reopen(os.Getenv("LOG")); err != nil {
					fmt.Fprintln(os.Stderr, err)
				}
			} else if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
		}
	}()
	<-ready
	wg.Wait()
	return log.Close()
}

// follow does what the supervisor's output does.
func follow(s *Stream, fd int) {
	s.Write()
	for {
		b, err := s.Receive(fd)
		switch {
		case err == unix.EAGAIN:
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
		case len(b) == 0:
			s.End()
			return
		default:
			s.Write()
		}
	}
}

// keeper is the process that outlives the copiers.
type keeper struct {
	t       *testing.T
	path    string
	sources [2]*os.File
	lanes   map[int][]*os.File
	env     []string
	extra   int // rotated files
}

func newKeeper(t *testing.T, sources [2]*os.File) *keeper {
	k := &keeper{t: t, path: filepath.Join(t.TempDir(), "0.log"), sources: sources, lanes: map[int][]*os.File{}}
	t.Cleanup(k.close)
	return k
}

func (k *keeper) close() {
	for _, files := range append(slices.Collect(maps.Values(k.lanes)), k.sources[:]) {
		for _, f := range files {
			_ = f.Close() // again at the end of the test
		}
	}
}

// child is a running copier.
type child struct {
	k       *keeper
	cmd     *exec.Cmd
	control *net.UnixConn
	errors  bytes.Buffer
	ready   chan struct{}
	served  chan struct{}
}

func (k *keeper) start(killAt int) *child {
	k.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		k.t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "control")
	ours := os.NewFile(uintptr(pair[0]), "control")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		k.t.Fatal(err)
	}
	c := &child{k: k, control: conn.(*net.UnixConn), ready: make(chan struct{}), served: make(chan struct{})}
	c.cmd = exec.Command(os.Args[0])
	c.cmd.Env = append(os.Environ(), append(k.env, "BERTH_TEST_ROLE=copier", "LOG="+k.path,
		"KILL_AT="+strconv.Itoa(killAt), "LANES="+strconv.Itoa(len(k.lanes)))...)
	c.cmd.Stderr = &c.errors
	c.cmd.ExtraFiles = []*os.File{k.sources[0], k.sources[1], theirs}
	for _, l := range k.lanes {
		c.cmd.ExtraFiles = append(c.cmd.ExtraFiles, l...)
	}
	if err := c.cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	theirs.Close()
	go c.serve()
	return c
}

// serve takes the lanes that the copier makes.
func (c *child) serve() {
	defer close(c.served)
	defer c.control.Close()
	b, oob := make([]byte, 2), make([]byte, unix.CmsgSpace(3*4))
	for {
		n, o, _, _, err := c.control.ReadMsgUnix(b, oob)
		if err != nil || n == 0 {
			return
		}
		if b[0] == 'r' {
			close(c.ready)
			continue
		}
		m, err := unix.ParseSocketControlMessage(oob[:o])
		if err != nil || len(m) != 1 {
			c.k.t.Error(len(m), err)
			return
		}
		fds, err := unix.ParseUnixRights(&m[0])
		id := int(b[1])
		if err != nil || c.k.lanes[id] != nil {
			c.k.t.Error("a second lane", id, err)
			return
		}
		var files []*os.File
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "lane"))
		}
		c.k.lanes[id] = files
		_, _ = c.control.Write([]byte{'k'})
	}
}

// wait reports whether the copier was killed; else it has copied everything.
func (c *child) wait() (killed bool) {
	c.k.t.Helper()
	timer := time.AfterFunc(pace.Wait(30*time.Second), func() { _ = c.cmd.Process.Signal(unix.SIGQUIT) })
	err := c.cmd.Wait()
	timer.Stop()
	<-c.served
	if err == nil {
		return false
	}
	if ws := c.cmd.ProcessState.Sys().(interface{ Signal() unix.Signal }); ws.Signal() != unix.SIGKILL {
		c.k.t.Fatalf("copier: %v\n%s", err, c.errors.Bytes())
	}
	return true
}

// rotate renames the log, as the kubelet does before it asks for a Reopen.
func (k *keeper) rotate() {
	err := os.Rename(k.path, fmt.Sprintf("%s.%04d", k.path, k.extra))
	if err == nil {
		k.extra++
	} else if !errors.Is(err, os.ErrNotExist) {
		k.t.Error(err)
	}
}

// files are all logs in the order of their making.
func (k *keeper) files() []string {
	old, err := filepath.Glob(k.path + ".*")
	if err != nil {
		k.t.Fatal(err)
	}
	slices.Sort(old)
	return append(old, k.path)
}

// content puts the records of the files together again.
func content(t testing.TB, files []string) map[string][]byte {
	t.Helper()
	out, last := map[string][]byte{}, map[string]string{}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for line := range bytes.Lines(b) {
			f := strings.SplitN(string(line), " ", 4)
			if len(f) != 4 || !strings.HasSuffix(f[3], "\n") || len(f[0]) != len(timeFormat) || f[2] != "P" && f[2] != "F" || len(f[3]) > MaxContent+1 {
				t.Fatalf("%s: record %.80q...%.20q", file, line, line[max(0, len(line)-20):])
			}
			if f[0] < last[f[1]] {
				t.Errorf("time of %s goes back: %s after %s", f[1], f[0], last[f[1]])
			}
			last[f[1]] = f[0]
			if f[2] == "P" {
				f[3] = f[3][:len(f[3])-1]
			}
			out[f[1]] = append(out[f[1]], f[3]...)
		}
	}
	return out
}

func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for i < min(len(got), len(want)) && got[i] == want[i] {
		i++
	}
	t.Fatalf("%s: %d bytes in the log, %d were written; they differ from byte %d on: %.60q, want %.60q", what, len(got), len(want), i, got[i:], want[i:])
}

// lines makes n numbered lines of very different lengths.
func lines(rng *rand.Rand, size int) []byte {
	var out []byte
	for i := 0; len(out) < size; i++ {
		n := rng.IntN(120)
		switch rng.IntN(40) {
		case 0:
			n = rng.IntN(3 * MaxContent)
		case 1:
			n = MaxContent - len(strconv.Itoa(i)) - 1 + rng.IntN(3)
		case 2: // many empty ones: much more comes out than in
			out = append(out, bytes.Repeat([]byte{'\n'}, rng.IntN(9000))...)
		}
		out = fmt.Appendf(out, "%d %s\n", i, bytes.Repeat([]byte{byte('a' + i%26)}, n))
	}
	return append(out, "no newline at the end"...)
}

// pipes makes the two sources and starts their writers. What they write, in
// pieces of very different sizes, is returned.
func pipes(t *testing.T, rng *rand.Rand, size int) (sources [2]*os.File, want map[string][]byte, done func()) {
	t.Helper()
	want = map[string][]byte{}
	var wg sync.WaitGroup
	for i, name := range streamNames {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		if err := unix.SetNonblock(p[0], true); err != nil {
			t.Fatal(err)
		}
		sources[i] = os.NewFile(uintptr(p[0]), name)
		in := lines(rng, size)
		want[name] = in
		seed := rng.Uint64()
		wg.Go(func() {
			defer unix.Close(p[1])
			write(in, rand.New(rand.NewPCG(seed, 1)), func(b []byte) (int, error) { return unix.Write(p[1], b) })
		})
	}
	return sources, want, wg.Wait
}

// terminal is pipes for a container with a terminal; its stderr is empty.
func terminal(t *testing.T, rng *rand.Rand, size int) (sources [2]*os.File, want map[string][]byte, done func()) {
	t.Helper()
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	sources[0] = os.NewFile(uintptr(master), "ptmx")
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	attr, err := unix.IoctlGetTermios(slave, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	attr.Oflag &^= unix.OPOST // no \r before \n
	if err := unix.IoctlSetTermios(slave, unix.TCSETS, attr); err != nil {
		t.Fatal(err)
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	unix.Close(p[1])
	sources[1] = os.NewFile(uintptr(p[0]), "stderr")
	in := lines(rng, size)
	seed := rng.Uint64()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer unix.Close(slave)
		write(in, rand.New(rand.NewPCG(seed, 1)), func(b []byte) (int, error) { return unix.Write(slave, b) })
	})
	return sources, map[string][]byte{"stdout": in}, wg.Wait
}

func write(in []byte, rng *rand.Rand, to func([]byte) (int, error)) {
	for len(in) > 0 {
		most := []int{1, 100, 5000, 64 << 10}[rng.IntN(4)]
		n := min(1+rng.IntN(most), len(in))
		n, err := to(in[:n])
		if err != nil && err != unix.EINTR && err != unix.EAGAIN {
			return
		}
		in = in[max(n, 0):]
		if rng.IntN(20) == 0 {
			time.Sleep(time.Duration(rng.IntN(500)) * time.Microsecond)
		}
	}
}

// TestKilledAtEveryStep kills a copier at its first step, its second one and so
// on, and half-way in each write to the log; the next one gets half as far, the
// third one finishes. Every third time the log is rotated in between.
func TestKilledAtEveryStep(t *testing.T) {
	for name, sources := range map[string]func(*testing.T, *rand.Rand) ([2]*os.File, map[string][]byte, func()){
		"pipes": func(t *testing.T, rng *rand.Rand) ([2]*os.File, map[string][]byte, func()) {
			return pipes(t, rng, 60<<10)
		},
		"terminal": func(t *testing.T, rng *rand.Rand) ([2]*os.File, map[string][]byte, func()) {
			return terminal(t, rng, 15<<10)
		},
	} {
		t.Run(name, func(t *testing.T) {
			for k := 1; ; k++ {
				sources, want, done := sources(t, rand.New(rand.NewPCG(7, 7))) // the same each time
				kp := newKeeper(t, sources)
				killed := kp.start(k).wait()
				if killed {
					if k%3 == 1 {
						kp.rotate()
					}
					if kp.start(1 + k/2).wait() {
						if k%3 == 2 {
							kp.rotate()
						}
						if kp.start(0).wait() {
							t.Fatal("killed by whom?")
						}
					}
				}
				done()
				got := content(t, kp.files())
				for name := range want {
					same(t, fmt.Sprintf("killed at step %d: %s", k, name), got[name], want[name])
				}
				if kp.close(); !killed {
					t.Logf("%d steps", k-1)
					return
				}
			}
		})
	}
}

// TestKilledAtRandomMoments kills copiers while two streams write and the log is
// rotated.
func TestKilledAtRandomMoments(t *testing.T) {
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 3))
	kills, moved := 0, 0
	for round := 0; kills < 300; round++ {
		of, size := pipes, 6<<20
		if round%3 == 2 {
			of, size = terminal, 3<<20
		}
		sources, want, done := of(t, rng, size)
		kp := newKeeper(t, sources)
		kp.env = []string{"TOGETHER=1"}
		for {
			c := kp.start(0)
			select {
			case <-c.ready:
				time.Sleep(time.Duration(rng.IntN(6000)) * time.Microsecond)
			case <-c.served:
			}
			if rng.IntN(4) == 0 {
				kp.rotate()
				moved++
				if rng.IntN(2) == 0 {
					_, _ = c.control.Write([]byte{'r'})
					time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
				}
			}
			_ = c.cmd.Process.Kill()
			if !c.wait() {
				break
			}
			kills++
		}
		done()
		got := content(t, kp.files())
		for name := range want {
			same(t, fmt.Sprintf("round %d: %s", round, name), got[name], want[name])
		}
		t.Logf("round %d: %d kills, %d rotations, %d lanes", round, kills, moved, len(kp.lanes))
	}
}
