package embedded

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A script is the child's side of a start: system calls with all their memory,
// laid out by the parent and run by a tiny interpreter in a process that holds
// nothing else (interp_*.s). The child's table of fds is 0-2 stdio, then the
// extra files that the user's program gets, the status pipe, the program itself,
// and what the script uses.
type script struct {
	ops   []op
	names []string // what each op is for, in error messages
	data  []byte
	extra []*os.File
	files []*os.File
}

// op is one system call as the interpreter reads it: 11 words. The number testNR
// is no system call: its result is 0 if args[0]&args[1] == args[2], and -args[3]
// otherwise.
type op struct {
	nr     uintptr
	args   [6]uintptr
	refs   uintptr // bit i (0-3): args[i] is the address of its value
	ret    uintptr // address that takes the result, or 0
	ignore uintptr // bit e: errno e is no failure; all ones: any errno
	skip   uintptr // bytes of ops to leave out after an ignored errno
}

const (
	opSize     = unsafe.Sizeof(op{})
	opsBase    = 0x10000000
	dataBase   = 0x20000000
	recordSize = 512 // failed op's address, errno, cells, the status pipe's number; the last 64 bytes stay zero
	statusAt   = recordSize - 64 - 8
	maxCells   = (statusAt - 16) / 8
	anyErrno   = ^uintptr(0)
	testNR     = ^uintptr(0)
)

// ref is the address of a word in the child's memory, filled by an earlier op.
type ref uintptr

// childFD is an fd number in the child's table.
type childFD int

// newScript starts a script whose program will have the extra files as its
// descriptors 3 and up.
func newScript(extra []*os.File) *script {
	s := &script{data: make([]byte, recordSize, 8192), ops: make([]op, 0, 128), names: make([]string, 0, 128), extra: extra}
	binary.LittleEndian.PutUint64(s.data[statusAt:], uint64(s.status()))
	return s
}

// status is the child's end of the status pipe.
func (s *script) status() childFD { return childFD(3 + len(s.extra)) }

// program is the start program itself.
func (s *script) program() childFD { return s.status() + 1 }

// fd gives f a place in the child's table.
func (s *script) fd(f *os.File) childFD {
	s.files = append(s.files, f)
	return s.program() + childFD(len(s.files))
}

// put copies b to the child's data and returns its address there.
func (s *script) put(b []byte) uintptr {
	at := len(s.data)
	s.data = append(s.data, b...)
	for len(s.data)%8 != 0 {
		s.data = append(s.data, 0)
	}
	return dataBase + uintptr(at)
}

func (s *script) str(v string) uintptr { return s.put(append([]byte(v), 0)) }

// word reserves a result.
func (s *script) word() ref { return ref(s.put(make([]byte, 8))) }

// cell is word i of the record, which the parent sees after a failure.
func (s *script) cell(i int) ref { return ref(dataBase + 16 + 8*uintptr(i)) }

// strs lays out a NULL-terminated array of strings.
func (s *script) strs(v []string) uintptr {
	b := make([]byte, 0, 8*len(v)+8)
	for _, x := range v {
		b = binary.LittleEndian.AppendUint64(b, uint64(s.str(x)))
	}
	return s.put(append(b, make([]byte, 8)...))
}

// bytesOf is the memory of a kernel structure.
func bytesOf[T any](p *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p))
}

// call is an op that was just appended; its methods refine it.
type call struct {
	s *script
	i int
}

// do appends a system call. Arguments are int, uintptr, childFD, ref, string
// (NUL-terminated) or []byte.
func (s *script) do(name string, nr uintptr, args ...any) call {
	o := op{nr: nr}
	for i, x := range args {
		switch v := x.(type) {
		case int:
			o.args[i] = uintptr(v)
		case childFD:
			o.args[i] = uintptr(v)
		case uintptr:
			o.args[i] = v
		case ref:
			o.args[i] = uintptr(v)
			o.refs |= 1 << i
		case string:
			o.args[i] = s.str(v)
		case []byte:
			o.args[i] = s.put(v)
		default:
			panic(fmt.Sprintf("script argument of type %T", x))
		}
	}
	s.ops = append(s.ops, o)
	s.names = append(s.names, name)
	return call{s, len(s.ops) - 1}
}

// out keeps the result for later ops.
func (c call) out() ref {
	r := c.s.word()
	c.s.ops[c.i].ret = uintptr(r)
	return r
}

func (c call) to(r ref) call {
	c.s.ops[c.i].ret = uintptr(r)
	return c
}

// ignore lets the script go on after one of the errnos (all below 64).
func (c call) ignore(errnos ...unix.Errno) call {
	for _, e := range errnos {
		c.s.ops[c.i].ignore |= 1 << e
	}
	return c
}

func (c call) ignoreAny() call {
	c.s.ops[c.i].ignore = anyErrno
	return c
}

// skip leaves out n ops after an ignored errno; -1 repeats the op.
func (c call) skip(n int) call {
	c.s.ops[c.i].skip = uintptr(n * int(opSize))
	return c
}

// test appends a comparison: the script goes on if v&mask == want. Otherwise it
// fails with e, or takes the way that ignore and skip give it.
func (s *script) test(name string, v ref, mask, want int, e unix.Errno) call {
	return s.do(name, testNR, v, mask, want, int(e))
}

// jump leaves out the next n ops.
func (s *script) jump(n int) {
	s.do("jump", testNR, 0, 0, 1, int(unix.EPERM)).ignore(unix.EPERM).skip(n)
}

// Messages on the status pipe, of two words each. What is longer is a record.
const (
	msgSize    = 16
	msgPid     = 1 // the process goes on as the pid given: its first one ends
	msgHold    = 2 // it waits
	msgFilter  = 3 // it waits; the descriptor given is its seccomp listener
	msgSched   = 4 // it waits to be given its scheduling policy
	maxMessage = 4
)

// openat2 appends the opening of a path below the working directory. The kernel
// answers EAGAIN when a mount or rename anywhere on the machine came between the
// steps of a path with "..".
func (s *script) openat2(name, path string, how *unix.OpenHow) ref {
	c := s.do(name, unix.SYS_OPENAT2, unix.AT_FDCWD, path, bytesOf(how), unix.SizeofOpenHow)
	return c.ignore(unix.EAGAIN).skip(-1).out()
}

// message lays out a message; the op that is to fill its second word keeps its
// result in value.
func (s *script) message(kind int) (at uintptr, value ref) {
	b := make([]byte, msgSize)
	binary.LittleEndian.PutUint64(b, uint64(kind))
	at = s.put(b)
	return at, ref(at + 8)
}

// tell appends the sending of a message. It is a plain write: with a filter that
// asks its listener, more may not be possible.
func (s *script) tell(at uintptr) { s.do("status", unix.SYS_WRITE, s.status(), at, msgSize) }

// hold appends a wait for one byte from f that is told first.
func (s *script) hold(f childFD) {
	at, _ := s.message(msgHold)
	s.tell(at)
	s.wait(f)
}

// wait appends a wait for one byte from f. The end of f, when everybody who
// could write to it is gone, ends the script.
func (s *script) wait(f childFD) {
	n := s.do("wait", unix.SYS_READ, f, make([]byte, 8), 1).out()
	s.test("wait: the runtime is gone", n, -1, 1, unix.ECANCELED)
}

// ending are the signals that are sent to end a program.
var ending = []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGABRT, unix.SIGTERM}

// endAtGate appends a wait until f can be read in which one of the ending
// signals ends the script with 128 and its number. The first process of a PID
// namespace gets none that it does not handle, and the program that would runs
// only later. spare is the number of a descriptor that is free.
func (s *script) endAtGate(f, spare childFD) {
	set := uint64(0)
	for _, sig := range ending {
		set |= 1 << (sig - 1)
	}
	mask := s.put(bytesOf(&set))
	s.do("gate", unix.SYS_RT_SIGPROCMASK, 0, mask, 0, 8) // blocked, they are kept
	fd := s.do("gate", unix.SYS_SIGNALFD4, -1, mask, 8, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK).out()
	s.do("gate", unix.SYS_DUP3, fd, spare, unix.O_CLOEXEC).ignore(unix.EINVAL) // EINVAL: it has that number
	either := []unix.PollFd{{Fd: int32(f), Events: unix.POLLIN}, {Fd: int32(spare), Events: unix.POLLIN}}
	s.do("gate", unix.SYS_PPOLL, append(bytesOf(&either[0]), bytesOf(&either[1])...), len(either), 0, 0, 0)
	info := s.put(bytesOf(&unix.SignalfdSiginfo{})) // its first word is the signal
	s.do("gate", unix.SYS_READ, spare, info, len(bytesOf(&unix.SignalfdSiginfo{}))).ignore(unix.EAGAIN).skip(2 * len(ending))
	for _, sig := range ending {
		s.test("gate", ref(info), 0xffffffff, int(sig), unix.EPERM).ignore(unix.EPERM).skip(1)
		s.do("exit", unix.SYS_EXIT_GROUP, 128+int(sig))
	}
	none := uint64(0)
	s.do("signal mask", unix.SYS_RT_SIGPROCMASK, 2, bytesOf(&none), 0, 8)
}

// forkInside appends a fork: the script goes on in the child, which has flags'
// new namespaces and the PID namespace that the script joined, and is the
// runtime's child like the process that made it. That one tells its pid and ends.
func (s *script) forkInside(flags int) {
	args := make([]byte, 88) // struct clone_args; no exit signal: CLONE_PARENT takes over the caller's
	binary.LittleEndian.PutUint64(args, uint64(flags|unix.CLONE_PARENT))
	at, pid := s.message(msgPid)
	s.do("clone3", unix.SYS_CLONE3, args, len(args)).to(pid)
	s.test("clone3", pid, -1, 0, unix.EPERM).ignore(unix.EPERM).skip(1)
	s.jump(2)
	s.tell(at)
	s.do("exit", unix.SYS_EXIT_GROUP, 0)
}

// record is what a failed script reports.
type record struct {
	name  string
	errno unix.Errno
	cells [maxCells]int64
}

// parseRecord reads a record; names are those of the ops from number first on.
func parseRecord(b []byte, names []string, first int) (record, error) {
	var r record
	if len(b) < recordSize {
		return r, fmt.Errorf("start program: short status of %d bytes", len(b))
	}
	i := (binary.LittleEndian.Uint64(b) - opsBase) / uint64(opSize)
	if i < uint64(first) || i-uint64(first) >= uint64(len(names)) {
		return r, fmt.Errorf("start program: status names op %d of %d to %d", i, first, first+len(names)-1)
	}
	r.name, r.errno = names[i-uint64(first)], unix.Errno(binary.LittleEndian.Uint64(b[8:]))
	for k := range r.cells {
		r.cells[k] = int64(binary.LittleEndian.Uint64(b[16+8*k:]))
	}
	return r, nil
}
