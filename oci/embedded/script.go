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
// nothing else (interp_*.s). The child's table of fds is 0-2 stdio, 3 the
// status pipe, 4 the program itself, then what the script uses.
type script struct {
	ops   []op
	names []string // what each op is for, in error messages
	data  []byte
	files []*os.File
	cells int // used words of the record
}

// op is one system call as the interpreter reads it: 11 words.
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
	recordSize = 512 // failed op's address, errno, cells; the last 64 bytes stay zero
	maxCells   = (recordSize - 64 - 16) / 8
	statusFD   = 3
	programFD  = 4
	firstFD    = 5
	anyErrno   = ^uintptr(0)
)

// ref is the address of a word in the child's memory, filled by an earlier op.
type ref uintptr

// childFD is an fd number in the child's table.
type childFD int

func newScript() *script {
	return &script{data: make([]byte, recordSize, 8192), ops: make([]op, 0, 128), names: make([]string, 0, 128)}
}

// fd gives f a place in the child's table.
func (s *script) fd(f *os.File) childFD {
	s.files = append(s.files, f)
	return childFD(firstFD + len(s.files) - 1)
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

// cell reserves a word of the record, which the parent sees after a failure.
func (s *script) cell() (ref, int, bool) {
	if s.cells == maxCells {
		return 0, 0, false
	}
	s.cells++
	return ref(dataBase + 16 + 8*uintptr(s.cells-1)), s.cells - 1, true
}

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

// record is what a failed script reports.
type record struct {
	name  string
	errno unix.Errno
	cells [maxCells]int64
}

func (s *script) parse(b []byte) (record, error) {
	var r record
	if len(b) < recordSize {
		return r, fmt.Errorf("start program: short status of %d bytes", len(b))
	}
	i := (binary.LittleEndian.Uint64(b) - opsBase) / uint64(opSize)
	if i >= uint64(len(s.names)) {
		return r, fmt.Errorf("start program: status names op %d of %d", i, len(s.names))
	}
	r.name, r.errno = s.names[i], unix.Errno(binary.LittleEndian.Uint64(b[8:]))
	for k := range r.cells {
		r.cells[k] = int64(binary.LittleEndian.Uint64(b[16+8*k:]))
	}
	return r, nil
}
