package lane

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ends makes a non-blocking pipe.
func ends(t testing.TB) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	return p[0], p[1]
}

func fill(t testing.TB, fd int, p []byte) {
	t.Helper()
	if n, err := unix.Write(fd, p); n != len(p) {
		t.Fatalf("wrote %d of %d bytes: %v", n, len(p), err)
	}
}

func receive(t testing.TB, l *Lane, fd int, via *Via, want string) {
	t.Helper()
	n, err := l.Receive(fd, via)
	if err != nil || n != len(want) || !bytes.HasSuffix(l.Bytes(), []byte(want)) {
		t.Fatalf("received %d bytes, %v, want %q at the end of %q", n, err, want, l.Bytes())
	}
}

// kept are duplicates of the lane's files, as another process holds them.
func kept(t testing.TB, l *Lane) []*os.File {
	t.Helper()
	files, err := l.Files()
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// next is the lane as the next process sees it.
func next(t testing.TB, l *Lane) *Lane {
	t.Helper()
	n, err := Open(kept(t, l))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// terminal makes a pty whose slave passes bytes on as they are.
func terminal(t testing.TB) (master, slave int) {
	t.Helper()
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(master) })
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if slave, err = unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	attr, err := unix.IoctlGetTermios(slave, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	attr.Oflag &^= unix.OPOST
	if err := unix.IoctlSetTermios(slave, unix.TCSETS, attr); err != nil {
		t.Fatal(err)
	}
	return master, slave
}

func TestReceive(t *testing.T) {
	p := NewPool(nil, nil, func(err error) { t.Error(err) })
	t.Run("pipe", func(t *testing.T) {
		r, end := ends(t)
		w, err := unix.FcntlInt(uintptr(end), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		l, via := p.Take(Owner{"c", 0}), spliced
		if _, err := l.Receive(r, &via); err != unix.EAGAIN {
			t.Errorf("empty: %v", err)
		}
		fill(t, w, []byte("one"))
		receive(t, l, r, &via, "one")
		fill(t, w, []byte(" two"))
		receive(t, l, r, &via, " two")
		unix.Close(w)
		if _, err := l.Receive(r, &via); err != unix.EAGAIN {
			t.Errorf("one of two ends is closed: %v", err)
		}
		if string(l.Bytes()) != "one two" || via != spliced {
			t.Errorf("%q by way %d", l.Bytes(), via)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		master, slave := terminal(t)
		l, via := p.Take(Owner{"c", 0}), spliced
		if _, err := l.Receive(master, &via); err != unix.EAGAIN {
			t.Errorf("empty: %v", err)
		}
		fill(t, slave, []byte("login: "))
		receive(t, l, master, &via, "login: ")
		fill(t, slave, []byte("bye"))
		unix.Close(slave)
		receive(t, l, master, &via, "bye")
		if n, err := l.Receive(master, &via); n != 0 || err != unix.EIO {
			t.Errorf("hung up: %d, %v", n, err)
		}
		if string(l.Bytes()) != "login: bye" || via != piped {
			t.Errorf("%q by way %d", l.Bytes(), via)
		}
	})
	t.Run("what cannot be spliced", func(t *testing.T) {
		fd, err := unix.Eventfd(1, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		l, via := p.Take(Owner{"c", 0}), spliced
		n, err := l.Receive(fd, &via)
		if n != 8 || err != nil || via != copied {
			t.Fatalf("%d, %v by way %d", n, err, via)
		}
		if got := next(t, l).Bytes(); len(got) != 8 {
			t.Errorf("the next process has %d bytes of 8", len(got))
		}
		if _, err := l.Receive(fd, &via); err != unix.EAGAIN {
			t.Errorf("empty: %v", err)
		}
	})
}

// TestRoom: bytes that stay do not stop those that come.
func TestRoom(t *testing.T) {
	r, w := ends(t)
	l, via := NewPool(nil, nil, nil).Take(Owner{"c", 0}), spliced
	var in, out []byte
	for i := range 3000 {
		p := bytes.Repeat([]byte{byte(i)}, 1+i*7919%Batch)
		fill(t, w, p)
		in = append(in, p...)
		for {
			if _, err := l.Receive(r, &via); err == unix.EAGAIN {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if take := len(l.Bytes()) - i*31%Rest; take > 0 {
				out = append(out, l.Bytes()[:take]...)
				l.Skip(take)
			}
			if i%50 == 0 {
				l.Trim()
			}
		}
	}
	if out = append(out, l.Bytes()...); !bytes.Equal(in, out) {
		t.Errorf("%d bytes became %d", len(in), len(out))
	}
}

// TestFront: at no moment of a move does the next process see anything but the
// bytes that are there.
func TestFront(t *testing.T) {
	defer func() { Boundary = nil }()
	r, w := ends(t)
	via := spliced
	for base := 0; base <= 40_000; base += 2500 {
		for n := 0; n <= Rest; n += 4096 {
			l := NewPool(nil, nil, nil).Take(Owner{"c", 0})
			in := make([]byte, base+n)
			for i := range in {
				in[i] = byte(i % 251)
			}
			if len(in) > 0 {
				fill(t, w, in)
				receive(t, l, r, &via, string(in))
			}
			l.Skip(base)
			var look func()
			look = func() {
				Boundary = nil // Open has some too
				defer func() { Boundary = look }()
				if o := next(t, l); !bytes.Equal(o.Bytes(), in[base:]) {
					t.Errorf("base %d, %d bytes: %d other ones", base, n, len(o.Bytes()))
				} else {
					o.Close()
				}
			}
			Boundary = look
			if err := l.front(); err != nil {
				t.Fatal(err)
			}
			look()
			Boundary = nil
			if l.base > 0 && l.base >= n {
				t.Errorf("base %d, %d bytes: not moved", base, n)
			}
			l.Close()
		}
	}
}

func TestNextProcess(t *testing.T) {
	r, w := ends(t)
	via := spliced
	p := NewPool(nil, nil, nil)
	l := p.Take(Owner{strings.Repeat("a", 64), 1})
	if _, _, busy := next(t, l).Owner(); busy {
		t.Error("busy with nothing")
	}
	fill(t, w, []byte("one\ntwo\nthr"))
	receive(t, l, r, &via, "one\ntwo\nthr")
	l.Skip(4)
	n := next(t, l)
	if c, stream, busy := n.Owner(); c != strings.Repeat("a", 64) || stream != 1 || !busy || n.ID() != l.ID() {
		t.Errorf("owner %s %d, busy %v, id %d", c, stream, busy, n.ID())
	}
	if got, _ := n.Armed(); string(n.Bytes()) != "two\nthr" || got != nil {
		t.Errorf("%q, armed %q", n.Bytes(), got)
	}
	want := Write{Dev: 1, Ino: 2, Size: 3, Time: time.Unix(4, 5).UTC()}
	l.Arm(4, want)
	n = next(t, l)
	if got, how := n.Armed(); string(got) != "two\n" || how != want {
		t.Errorf("armed %q, %+v", got, how)
	}
	n.Commit()
	if n = next(t, n); string(n.Bytes()) != "thr" || !n.Last().Equal(want.Time) {
		t.Errorf("committed: %q, last %v", n.Bytes(), n.Last())
	}
	n.Arm(3, want)
	n.Disarm()
	if got, _ := next(t, n).Armed(); got != nil || string(n.Bytes()) != "thr" {
		t.Errorf("disarmed: %q of %q", got, n.Bytes())
	}
	p.Put(n)
	n = p.Take(Owner{"b", 0})
	if len(n.Bytes()) != 0 || !n.Last().IsZero() {
		t.Errorf("another owner's lane: %q, last %v", n.Bytes(), n.Last())
	}
}

// resident is how many bytes of memory the lane takes.
func resident(t *testing.T, l *Lane) int {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(l.mem, &st); err != nil {
		t.Fatal(err)
	}
	return int(st.Blocks) * 512
}

func TestTrim(t *testing.T) {
	r, w := ends(t)
	via := spliced
	p := NewPool(nil, nil, nil)
	l := p.Take(Owner{"c", 0})
	fill(t, w, bytes.Repeat([]byte{'x'}, Batch))
	if _, err := l.Receive(r, &via); err != nil {
		t.Fatal(err)
	}
	l.Skip(Batch - 10)
	if n := resident(t, l); n < Batch {
		t.Errorf("%d bytes resident", n)
	}
	l.Trim()
	if n := resident(t, l); n > 2*page || string(l.Bytes()) != "xxxxxxxxxx" {
		t.Errorf("an idle prompt takes %d bytes of memory: %q", n, l.Bytes())
	}
	fill(t, w, []byte("y"))
	receive(t, l, r, &via, "y")
	if string(next(t, l).Bytes()) != "xxxxxxxxxxy" {
		t.Errorf("%q", l.Bytes())
	}
}

func TestPool(t *testing.T) {
	var calls []string
	record := func(l *Lane) { calls = append(calls, fmt.Sprint("+", l.ID())) }
	p := NewPool(record, func(id int) { calls = append(calls, fmt.Sprint("-", id)) }, nil)
	said := func(want string) {
		t.Helper()
		if got := strings.Join(calls, " "); got != want {
			t.Errorf("announced and retired %q, want %q", got, want)
		}
		calls = nil
	}
	p.Warm()
	p.Warm()
	said("+0 +1 +2 +3")
	a := p.Take(Owner{"a", 0})
	b := p.Take(Owner{"b", 1})
	if p.Put(a); p.Take(Owner{"c", 0}) != a {
		t.Error("not the lane that came back last")
	}
	all := []*Lane{a, b}
	for range 4 {
		all = append(all, p.Take(Owner{"d", 0}))
	}
	said("+4 +5")
	for _, l := range slices.Backward(all) {
		p.Put(l)
	}
	said("-5 -4")
	kept, err := p.All()
	if err != nil || len(kept) != warm {
		t.Fatalf("%d lanes, %v", len(kept), err)
	}
	for i, k := range kept {
		l, err := Open(k.Files)
		if err != nil || k.ID != i || l.ID() != i {
			t.Fatalf("lane %d: id %d, %v", i, k.ID, err)
		}
		l.Close()
	}

	// The pool of a next process gets lane 1 twice.
	other := NewPool(nil, nil, nil)
	q := NewPool(record, nil, nil)
	b = p.Take(Owner{"b", 1})
	first, second := next(t, b), next(t, other.Take(Owner{"y", 0}))
	id := first.ID()
	second.h.id = uint32(id)
	q.Add(first)
	q.Add(second)
	if first.ID() != id || second.ID() == id {
		t.Errorf("ids %d and %d", first.ID(), second.ID())
	}
	said("+" + fmt.Sprint(second.ID()))
	if q.Put(first); q.Take(Owner{"d", 0}) != first {
		t.Error("another lane")
	}
}

// TestNoDescriptors: output goes on where no lane can be made.
func TestNoDescriptors(t *testing.T) {
	r, w := ends(t)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	failed := 0
	p := NewPool(nil, nil, func(error) { failed++ })
	p.Take(Owner{"b", 0})
	l, via := p.Take(Owner{"c", 0}), spliced
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		fill(t, w, bytes.Repeat([]byte{byte(i)}, 50_000))
		if n, err := l.Receive(r, &via); n != 50_000 || err != nil || l.Bytes()[len(l.Bytes())-1] != byte(i) {
			t.Fatalf("%d: %d bytes, %v", i, n, err)
		}
		l.Arm(40_000, Write{})
		l.Commit()
		l.Skip(len(l.Bytes()) - i)
		l.Trim()
	}
	p.Put(l)
	if failed != 1 || p.count() != 0 || p.Take(Owner{"c", 0}) == l {
		t.Errorf("failed %d times, %d lanes", failed, p.count())
	}
}

func TestOpenRefuses(t *testing.T) {
	set := func(change func(*header)) func(*Lane, []*os.File) {
		return func(l *Lane, _ []*os.File) { change(l.h) }
	}
	for name, damage := range map[string]func(*Lane, []*os.File){
		"magic":       set(func(h *header) { h.magic[0] = 'B' }),
		"version":     set(func(h *header) { h.version++ }),
		"stream":      set(func(h *header) { h.stream = 2 }),
		"name":        set(func(h *header) { h.named = 65 }),
		"id":          set(func(h *header) { h.id = math.MaxUint32 }),
		"base":        set(func(h *header) { h.state.Store(7 | 7<<field) }),
		"armed":       set(func(h *header) { h.state.Store(7 << field) }),
		"order":       set(func(h *header) { h.state.Store(2 | 1<<field) }),
		"move":        set(func(h *header) { h.state.Store(moved | mask<<(2*field)) }),
		"position":    func(l *Lane, _ []*os.File) { _, _ = unix.Seek(l.mem, size+1, unix.SEEK_SET) },
		"in header":   func(l *Lane, _ []*os.File) { _, _ = unix.Seek(l.mem, 3, unix.SEEK_SET) },
		"no memfd":    func(_ *Lane, f []*os.File) { f[0] = f[1] },
		"no pipe":     func(_ *Lane, f []*os.File) { f[1] = f[0] },
		"nothing":     func(_ *Lane, f []*os.File) { f[2] = nil },
		"another end": func(_ *Lane, f []*os.File) { r, _ := ends(t); f[1] = os.NewFile(uintptr(r), "") },
		"unsealed": func(_ *Lane, f []*os.File) {
			fd, _ := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
			_ = unix.Ftruncate(fd, size)
			f[0] = os.NewFile(uintptr(fd), "")
		},
		"empty": func(_ *Lane, f []*os.File) {
			fd, _ := unix.MemfdCreate("x", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
			f[0] = os.NewFile(uintptr(fd), "")
		},
	} {
		l, err := newLane(0)
		if err != nil {
			t.Fatal(err)
		}
		r, w := ends(t)
		via := spliced
		fill(t, w, []byte("12345"))
		receive(t, l, r, &via, "12345")
		files := kept(t, l)
		damage(l, files)
		if _, err := Open(files); err == nil {
			t.Errorf("%s: was opened", name)
		}
	}
	if _, err := Open(nil); err == nil {
		t.Error("no files: was opened")
	}
}

// FuzzDamaged: whatever is in a lane that was handed over, it is refused or of use
// afterwards.
func FuzzDamaged(f *testing.F) {
	good := header{magic: magic, version: version, stream: 1, named: 3, name: [64]byte{'a', 'b', 'c'}, dev: 1, ino: 2, size: 3, time: 4}
	good.state.Store(2 | 5<<field)
	whole := func(h *header) []byte {
		return bytes.Clone(unsafe.Slice((*byte)(unsafe.Pointer(h)), unsafe.Sizeof(*h)))
	}
	f.Add(whole(&good), int64(page+6), 0)
	f.Add(whole(&good), int64(size), 70_000)
	good.state.Store(moved | 9<<(2*field))
	f.Add(whole(&good), int64(size), 10)
	f.Add([]byte{}, int64(0), 0)
	f.Fuzz(func(t *testing.T, head []byte, position int64, inPipe int) {
		l, err := newLane(0)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		copy(unsafe.Slice((*byte)(unsafe.Pointer(l.h)), page), head)
		_, _ = unix.Seek(l.mem, position, unix.SEEK_SET)
		_, _ = unix.FcntlInt(uintptr(l.pipe[0]), unix.F_SETPIPE_SZ, 128<<10)
		fill(t, l.pipe[1], make([]byte, min(max(inPipe, 0), 128<<10)))
		n, err := Open(kept(t, l))
		if err != nil {
			return
		}
		defer n.Close()
		_, stream, _ := n.Owner()
		armed, w := n.Armed()
		if stream > 1 || len(armed) > len(n.Bytes()) || len(w.Time.Format(time.RFC3339Nano)) == 0 {
			t.Fatal(stream, len(armed), len(n.Bytes()))
		}
		if armed != nil {
			n.Commit()
		}
		n.Skip(max(0, len(n.Bytes())-Rest))
		r, wr := ends(t)
		via := spliced
		if _, err := n.Receive(r, &via); err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		p := NewPool(nil, nil, nil)
		p.Add(n)
		p.Put(n)
		if p.Take(Owner{"c", 0}) != n {
			t.Fatal("another lane")
		}
		fill(t, wr, []byte("hello"))
		receive(t, n, r, &via, "hello")
		if string(n.Bytes()) != "hello" {
			t.Fatalf("%q", n.Bytes())
		}
	})
}
