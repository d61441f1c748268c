package embedded

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// interp is the interpreter's text (interp_*.s); it is never called.
//
//lint:ignore U1000 its address is taken in assembly
func interp()

func interpAddr() uintptr

// interpText returns the interpreter's machine code.
var interpText = sync.OnceValue(func() []byte {
	addr := interpAddr()
	text := unsafe.Slice(*(**byte)(unsafe.Pointer(&addr)), 1024)
	end := bytes.Index(text, []byte{0xde, 0xad, 0xbe, 0xef})
	if end < 0 {
		panic("start program: no end mark")
	}
	return bytes.Clone(text[:end])
})

const (
	textBase  = 0x400000
	textStart = 64 + 4*56 // after the ELF and the program headers
)

// image is the script as a static ELF program: one page of headers and code,
// the ops, the data.
func (s *script) image() []byte {
	align := func(n int) int { return (n + elfAlign - 1) &^ (elfAlign - 1) }
	text := interpText()
	nops := len(s.ops) * int(opSize)
	opsAt := elfAlign
	dataAt := opsAt + align(nops)
	b := make([]byte, dataAt+len(s.data))
	le := binary.LittleEndian
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2) // ET_EXEC
	le.PutUint16(b[18:], elfMachine)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], textBase+textStart)
	le.PutUint64(b[32:], 64) // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 4)
	header := func(i int, kind, flags uint32, off, addr, n int) {
		p := b[64+56*i:]
		le.PutUint32(p, kind)
		le.PutUint32(p[4:], flags)
		for k, v := range []int{off, addr, addr, n, n, elfAlign} {
			le.PutUint64(p[8+8*k:], uint64(v))
		}
	}
	const load, stack, r, w, x = 1, 0x6474e551, 4, 2, 1
	header(0, load, r|x, 0, textBase, textStart+len(text))
	header(1, load, r, opsAt, opsBase, nops)
	header(2, load, r|w, dataAt, dataBase, len(s.data))
	header(3, stack, r|w, 0, 0, 0)
	copy(b[textStart:], text)
	if nops > 0 {
		copy(b[opsAt:], unsafe.Slice((*byte)(unsafe.Pointer(&s.ops[0])), nops))
	}
	copy(b[dataAt:], s.data)
	return b
}

const mfdExec = 0x10 // MFD_EXEC, 6.3

// programFile returns the image as an executable file that nobody can change
// and no path leads to: a sealed memfd, or where the administrator forbids
// executable memfds (vm.memfd_noexec=2) a file on a detached tmpfs.
func programFile(image []byte) (*os.File, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("berth-start", flags|mfdExec)
	if err == unix.EINVAL {
		fd, err = unix.MemfdCreate("berth-start", flags)
	}
	if err == unix.EACCES {
		return programOnTmpfs(image)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "berth-start")
	if _, err := f.Write(image); err != nil {
		f.Close()
		return nil, fmt.Errorf("write start program: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, fmt.Errorf("seal start program: %w", err)
	}
	return f, nil
}

func programOnTmpfs(image []byte) (*os.File, error) {
	m, err := kernel.NewFS("tmpfs", []kernel.FSOption{{Key: "mode", Value: "0700"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	fd, err := unix.Openat(int(m.Fd()), "start", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o500)
	if err != nil {
		return nil, fmt.Errorf("start program: %w", err)
	}
	w := os.NewFile(uintptr(fd), "start")
	_, err = w.Write(image)
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("write start program: %w", err)
	}
	fd, err = unix.Openat(int(m.Fd()), "start", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start program: %w", err)
	}
	return os.NewFile(uintptr(fd), "start"), nil
}
