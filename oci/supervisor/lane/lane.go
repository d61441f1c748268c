// Package lane keeps the bytes of a container's output, on their way from its
// pipe to its log, where the end of the process that handles them cannot lose
// them.
//
// A lane is a memfd, mapped, and a private pipe. Whoever is to outlive the
// supervisor holds duplicates of the three descriptors (Files), a next supervisor
// makes the same lane of them (Open). A stream borrows a lane from the Pool when
// it has something to read and gives it back when all of it is logged, so that a
// node has as many lanes as streams that are busy at one moment.
//
// # How no byte is lost or doubled
//
// splice(2) takes bytes out of the container's pipe and puts them into the memfd
// at its file position, which it moves. The position belongs to the open file
// description, which is not the supervisor's alone: all three changes happen in
// one system call, and a process that is killed has either made it or not (a
// system call is never left half-way, at most it ends early with all three
// changed alike). So the position always says how many bytes have come, and the
// header how many of them are dealt with:
//
//	0 ... base ............ armed ............ position
//	      being written to  came, not yet
//	      the log           looked at
//
// base and armed are parts of one word, stored at once. A write to the log first
// notes where the log file ends, then stores armed, writes, and stores base =
// armed. After a crash in between, the size of the file tells how much of the
// write has arrived (Armed). What is before base is in the log or given up; an
// unfinished line simply stays behind base, and is moved to the front when room
// gets short. The move is one store too: it says that the position is to be set.
//
// A terminal is no pipe. Its bytes are first spliced into the lane's pipe, which
// for the same reason cannot lose any, and from there into the memfd. A source
// that splices neither way is read(2), and so not safe from a crash.
//
// A lane is to be opened only when the former process has ended, all its threads
// included (its pidfd is readable): one that hangs in a system call may still
// change it, and its log.
//
// # Layout, version 1
//
// One page of header (type header, native byte order), then 80 KiB of content.
// A change of the layout, or of the form of a log record that a half-written
// batch has to be completed in, needs a new version.
package lane

import (
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	version = 1
	page    = 4096
	// Batch is the most bytes that one Receive takes.
	Batch = 64 << 10
	// Rest is the most bytes that may stay unlogged while the next ones come.
	Rest    = 16 << 10
	content = Batch + Rest
	size    = page + content

	// trimAbove is how many bytes of memory an idle lane may keep beside its content.
	trimAbove = 4 * page

	maxID = 1 << 20
)

var magic = [8]byte{'b', 'e', 'r', 't', 'h', 'l', 'a', 'n'}

// Boundary is nil outside of tests. It is called wherever a crash can separate
// two changes that outlive the process.
var Boundary func()

func boundary() {
	if Boundary != nil {
		Boundary()
	}
}

// header is the first page of the memfd.
type header struct {
	magic   [8]byte
	version uint32
	id      uint32
	// Who has the lane; read only while it is busy.
	stream uint32
	named  uint32
	name   [64]byte
	// state holds base, armed and, when the top bit is set, where the file
	// position has to be, in 20 bits each.
	state atomic.Uint64
	// The write that is armed, or else the last one of this owner.
	dev, ino uint64
	size     int64
	time     int64 // nanoseconds since 1970
}

const (
	field = 20
	mask  = 1<<field - 1
	moved = 1 << 63
)

// Owner is whose bytes are in a lane.
type Owner struct {
	Container string // at most 64 bytes
	Stream    int    // 0 stdout, 1 stderr
}

// Write is what is to be known of a write to a log file in order to complete it
// after a crash.
type Write struct {
	Dev, Ino uint64    // of the file
	Size     int64     // of the file, before the write
	Time     time.Time // that the records bear
}

// Lane is a lane. It is for one goroutine at a time.
type Lane struct {
	h     *header
	raw   []byte
	files []*os.File // memfd, read end, write end; nil when it lives in memory alone
	mem   int        // the descriptors
	pipe  [2]int

	base, armed, pos int
	high             int  // memory is in use up to here
	piped            bool // there may be bytes in the pipe
}

// newLane makes a lane that lives in its descriptors.
func newLane(id int) (*Lane, error) {
	fd, err := unix.MemfdCreate("berth-lane", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("berth-lane", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("lane: memfd_create: %w", err)
	}
	files := []*os.File{os.NewFile(uintptr(fd), "lane")}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, fail(files, "pipe", err)
	}
	files = append(files, os.NewFile(uintptr(p[0]), "lane pipe"), os.NewFile(uintptr(p[1]), "lane pipe"))
	if err := unix.Ftruncate(fd, size); err != nil {
		return nil, fail(files, "size", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, fail(files, "seal", err)
	}
	// By a system call, which can tell that there is no memory; the mapping could not.
	h := header{magic: magic, version: version, id: uint32(id)}
	if _, err := unix.Pwrite(fd, unsafe.Slice((*byte)(unsafe.Pointer(&h)), unsafe.Sizeof(h)), 0); err != nil {
		return nil, fail(files, "header", err)
	}
	if _, err := unix.Seek(fd, page, unix.SEEK_SET); err != nil {
		return nil, fail(files, "position", err)
	}
	l, err := attach(files)
	if err != nil {
		return nil, fail(files, "map", err)
	}
	return l, nil
}

func fail(files []*os.File, what string, err error) error {
	closeAll(files)
	return fmt.Errorf("lane: %s: %w", what, err)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nil, or again: to no effect
	}
}

// inMemory makes a lane that is lost with the process.
func inMemory() *Lane { return &Lane{h: &header{}, raw: make([]byte, content), mem: -1} }

// attach maps the memfd.
func attach(files []*os.File) (*Lane, error) {
	l := &Lane{files: files, mem: int(files[0].Fd()), pipe: [2]int{int(files[1].Fd()), int(files[2].Fd())}}
	m, err := unix.Mmap(l.mem, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	l.h, l.raw = (*header)(unsafe.Pointer(&m[0])), m[page:]
	return l, nil
}

// Open makes a lane of the files of one whose process has ended, and takes them
// over; on error it closes them. It believes nothing: what does not hold together
// is refused, and what holds together but is wrong costs no more than this lane's
// own bytes.
func Open(files []*os.File) (*Lane, error) {
	l, err := open(files)
	if err != nil {
		if l != nil {
			l.Close()
		}
		closeAll(files)
		return nil, fmt.Errorf("lane: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return l, nil
}

func open(files []*os.File) (*Lane, error) {
	if len(files) != 3 || files[0] == nil || files[1] == nil || files[2] == nil {
		return nil, fmt.Errorf("%d descriptors, want 3", len(files))
	}
	var st [3]unix.Stat_t
	for i, f := range files {
		if err := unix.Fstat(int(f.Fd()), &st[i]); err != nil {
			return nil, err
		}
	}
	// Without the seal somebody could make the file shorter, and our access a SIGBUS.
	seals, err := unix.FcntlInt(files[0].Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("descriptor 0: seals: %w", err)
	}
	if seals&unix.F_SEAL_SHRINK == 0 || st[0].Size != size {
		return nil, fmt.Errorf("descriptor 0: %d bytes with seals %#x, want %d that cannot be shortened", st[0].Size, seals, size)
	}
	if st[1].Mode&unix.S_IFMT != unix.S_IFIFO || st[1].Ino != st[2].Ino || st[1].Dev != st[2].Dev || st[2].Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, fmt.Errorf("descriptors 1 and 2 are not the ends of a pipe")
	}
	l, err := attach(files)
	if err != nil {
		return nil, err
	}
	if l.h.magic != magic || l.h.version != version {
		return l, fmt.Errorf("header: magic %q, version %d, want %q, %d", l.h.magic, l.h.version, magic, version)
	}
	state := l.h.state.Load()
	if state&moved != 0 { // it ended before it could set the position
		l.pos = int(state >> (2 * field) & mask)
		if l.pos > content {
			return l, fmt.Errorf("header: position %d", l.pos)
		}
		if err := l.seek(); err != nil {
			return l, err
		}
	} else {
		at, err := unix.Seek(l.mem, 0, unix.SEEK_CUR)
		if err != nil {
			return l, err
		}
		if at < page || at > size {
			return l, fmt.Errorf("position %d", at)
		}
		l.pos = int(at) - page
	}
	l.base, l.armed = int(state&mask), int(state>>field&mask)
	if l.base > l.armed || l.armed > l.pos || l.h.named > uint32(len(l.h.name)) || l.h.stream > 1 || l.h.id > maxID {
		return l, fmt.Errorf("header: base %d, armed %d, position %d, id %d, stream %d, name of %d bytes", l.base, l.armed, l.pos, l.h.id, l.h.stream, l.h.named)
	}
	l.store(l.base, l.armed)
	l.high, l.piped = content, true
	if n, err := unix.IoctlGetInt(l.pipe[0], unix.TIOCINQ); err == nil && n == 0 {
		l.piped = false
	}
	return l, nil
}

// Close ends the use of the lane in this process; what it holds stays with whoever
// else has its descriptors. A pool closes its lanes itself.
func (l *Lane) Close() {
	if l.files == nil {
		return
	}
	_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(l.h)), size))
	closeAll(l.files)
	l.h, l.raw, l.files = nil, nil, nil
}

// ID is the lane's number in its pool, the same for as long as the lane lives.
func (l *Lane) ID() int { return int(l.h.id) }

// Files returns what whoever keeps the lane is to hold, in the order that Open
// takes them: duplicates, which are the caller's. Nobody else may read, write or
// seek them.
func (l *Lane) Files() ([]*os.File, error) {
	var out []*os.File
	for _, f := range l.files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, fail(out, "dup", err)
		}
		out = append(out, os.NewFile(uintptr(fd), f.Name()))
	}
	return out, nil
}

// Owner returns whose bytes are in the lane; busy is whether there are any. The
// owner of one that is not busy means nothing.
func (l *Lane) Owner() (container string, stream int, busy bool) {
	return string(l.h.name[:l.h.named]), int(l.h.stream), l.busy()
}

func (l *Lane) busy() bool { return l.pos > l.base || l.piped }

// own makes the lane o's. It must not be busy: after a crash half-way nobody asks
// whose it was.
func (l *Lane) own(o Owner) {
	named := min(len(o.Container), len(l.h.name))
	if string(l.h.name[:l.h.named]) == o.Container[:named] && l.h.stream == uint32(o.Stream) {
		return
	}
	l.h.named = uint32(copy(l.h.name[:], o.Container))
	l.h.stream = uint32(o.Stream)
	l.h.time = 0
}

func (l *Lane) store(base, armed int) {
	l.base, l.armed = base, armed
	boundary()
	l.h.state.Store(uint64(base) | uint64(armed)<<field)
	boundary()
}

// seek sets the file position.
func (l *Lane) seek() error {
	if l.files == nil {
		return nil
	}
	_, err := unix.Seek(l.mem, int64(page+l.pos), unix.SEEK_SET)
	return err
}

// Bytes returns what has come and is not logged. It is valid until the next
// Receive, Trim or Put.
func (l *Lane) Bytes() []byte { return l.raw[l.base:l.pos] }

// Arm notes that the first n Bytes are about to be written to a log. Until Commit
// they are what Armed returns, also in the next process.
func (l *Lane) Arm(n int, w Write) {
	l.h.dev, l.h.ino, l.h.size, l.h.time = w.Dev, w.Ino, w.Size, w.Time.UnixNano()
	l.store(l.base, l.base+n)
}

// Armed returns the bytes whose write was begun, nil when there are none, and
// what Arm was given.
func (l *Lane) Armed() ([]byte, Write) {
	if l.armed == l.base {
		return nil, Write{}
	}
	return l.raw[l.base:l.armed], Write{Dev: l.h.dev, Ino: l.h.ino, Size: l.h.size, Time: l.Last()}
}

// Last is the time of the last write of the present owner; zero: none.
func (l *Lane) Last() time.Time {
	if l.h.time == 0 {
		return time.Time{}
	}
	return time.Unix(0, l.h.time).UTC()
}

// Commit says that the armed bytes are done with.
func (l *Lane) Commit() { l.store(l.armed, l.armed) }

// Disarm takes an Arm back: nothing of the write has arrived where it counts.
func (l *Lane) Disarm() { l.store(l.base, l.base) }

// Skip says that the first n Bytes are done with.
func (l *Lane) Skip(n int) { l.store(l.base+n, l.base+n) }

// front moves Bytes to the front, when they can be copied without touching what
// counts before the store.
func (l *Lane) front() error {
	n := l.pos - l.base
	if l.base < n || l.base == 0 || l.armed != l.base {
		return nil
	}
	copy(l.raw, l.raw[l.base:l.pos])
	boundary()
	l.h.state.Store(moved | uint64(n)<<(2*field))
	l.base, l.armed, l.pos = 0, 0, n
	boundary()
	if err := l.seek(); err != nil {
		return err
	}
	l.store(0, 0)
	return nil
}

// Via is how bytes come from a source: found out by trying, once.
type Via int

const (
	spliced Via = iota // a pipe
	piped              // a terminal
	copied             // anything else
)

// Receive takes what fd, which is non-blocking, has to give, at most Batch bytes,
// and appends it to Bytes. n is how many came: 0 without an error is the end.
// Nothing to take is EAGAIN. At most Rest Bytes may be there before.
func (l *Lane) Receive(fd int, via *Via) (n int, err error) {
	if content-l.pos < Batch {
		if err := l.front(); err != nil {
			return 0, err
		}
	}
	room := min(content-l.pos, Batch)
	if room == 0 {
		return 0, unix.ENOBUFS
	}
	if l.piped { // a former process was ended between the two moves
		if n, err = l.splice(l.pipe[0], l.mem, room); n > 0 || err != unix.EAGAIN {
			return l.came(n), err
		}
		l.piped = false
	}
	if l.files == nil {
		n, err = l.read(fd, room)
		return l.came(n), err
	}
	if *via == spliced {
		if n, err = l.splice(fd, l.mem, room); err != unix.EINVAL {
			return l.came(n), err
		}
		*via = piped
	}
	if *via == piped {
		if n, err = l.splice(fd, l.pipe[1], room); err != unix.EINVAL {
			if n <= 0 {
				return n, err
			}
			l.piped = true
			got, err := l.splice(l.pipe[0], l.mem, n)
			l.piped = got != n
			return l.came(got), err
		}
		*via = copied
	}
	n, err = l.read(fd, room)
	return l.came(n), err
}

func (l *Lane) came(n int) int {
	l.pos += n
	l.high = max(l.high, l.pos)
	return n
}

func (l *Lane) splice(from, to, most int) (int, error) {
	for {
		boundary()
		n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_NONBLOCK)
		boundary()
		if err != unix.EINTR {
			return max(int(n), 0), err
		}
	}
}

func (l *Lane) read(fd, most int) (int, error) {
	for {
		n, err := unix.Read(fd, l.raw[l.pos:l.pos+most])
		if err == unix.EINTR {
			continue
		}
		if n <= 0 {
			return 0, err
		}
		if l.files != nil {
			_, err = unix.Seek(l.mem, int64(page+l.pos+n), unix.SEEK_SET)
		}
		return n, err
	}
}

// Trim gives memory back that an idle lane does not need.
func (l *Lane) Trim() {
	if l.files == nil || l.high-(l.pos-l.base) <= trimAbove || l.front() != nil {
		return
	}
	from := (l.pos + page - 1) &^ (page - 1)
	if l.high > from && unix.Fallocate(l.mem, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(page+from), int64(content-from)) == nil {
		l.high = l.pos
	}
}

// discard forgets what is in the lane.
func (l *Lane) discard() {
	for range 64 { // a pipe holds 1 MiB at most
		l.store(l.pos, l.pos)
		if !l.piped || l.front() != nil {
			return
		}
		n, err := l.splice(l.pipe[0], l.mem, Batch)
		if err != nil || n == 0 {
			l.piped = err != unix.EAGAIN
			return
		}
		l.came(n)
	}
}
