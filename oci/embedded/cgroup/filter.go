package cgroup

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// insn is one eBPF instruction.
type insn struct {
	code byte
	regs byte // source << 4 | destination
	off  int16
	imm  int32
}

// Opcodes used.
const (
	ldxw   = 0x61 // dst = *(u32 *)(src + off)
	movImm = 0xb7
	movReg = 0xbf
	andImm = 0x57
	rshImm = 0x77
	jneImm = 0x55
	jneReg = 0x5d
	jeqImm = 0x15
	exit   = 0x95
)

// deviceProgram compiles rules to a BPF_PROG_TYPE_CGROUP_DEVICE program. The
// last rule that covers an access decides on it, so the program tests them
// backwards. A rule that allows covers an access when it allows all of it; one
// that denies, when it denies any part.
func deviceProgram(rs []rule) []insn {
	const r0, r1, r2, r3, r4, r5, r6 = 0, 1, 2, 3, 4, 5, 6
	p := []insn{
		{ldxw, r1<<4 | r2, 0, 0}, // access_type: access << 16 | type
		{movReg, r2<<4 | r3, 0, 0},
		{andImm, r2, 0, 0xffff}, // r2 type
		{rshImm, r3, 0, 16},     // r3 access
		{ldxw, r1<<4 | r4, 4, 0},
		{ldxw, r1<<4 | r5, 8, 0},
	}
	for _, r := range slices.Backward(rs) {
		if r.kind == 'a' {
			p = append(p, verdict(r.allow)...)
			return p
		}
		var block []insn
		kind := int32(unix.BPF_DEVCG_DEV_BLOCK)
		if r.kind == 'c' {
			kind = unix.BPF_DEVCG_DEV_CHAR
		}
		block = append(block, insn{jneImm, r2, 0, kind})
		if a := accessBits(r.access); r.allow && a != 7 {
			block = append(block, insn{movReg, r3<<4 | r6, 0, 0}, insn{andImm, r6, 0, a}, insn{jneReg, r3<<4 | r6, 0, 0})
		} else if !r.allow && a != 7 {
			// Some denied bit is asked for unless access & a == 0.
			block = append(block, insn{movReg, r3<<4 | r6, 0, 0}, insn{andImm, r6, 0, a}, insn{jeqImm, r6, 0, 0})
		}
		if r.major >= 0 {
			block = append(block, insn{jneImm, r4, 0, int32(r.major)})
		}
		if r.minor >= 0 {
			block = append(block, insn{jneImm, r5, 0, int32(r.minor)})
		}
		block = append(block, verdict(r.allow)...)
		for i := range block { // every jump leads behind the block
			if c := block[i].code; c == jneImm || c == jneReg || c == jeqImm {
				block[i].off = int16(len(block) - i - 1)
			}
		}
		p = append(p, block...)
	}
	return append(p, verdict(false)...)
}

func verdict(allow bool) []insn {
	v := int32(0)
	if allow {
		v = 1
	}
	return []insn{{movImm, 0, 0, v}, {exit, 0, 0, 0}}
}

func accessBits(s string) int32 {
	var a int32
	for _, c := range s {
		switch c {
		case 'm':
			a |= unix.BPF_DEVCG_ACC_MKNOD
		case 'r':
			a |= unix.BPF_DEVCG_ACC_READ
		case 'w':
			a |= unix.BPF_DEVCG_ACC_WRITE
		}
	}
	return a
}

// attachDeviceFilter loads the program and attaches it to a v2 cgroup. The
// cgroup holds the program; no fd stays open.
func attachDeviceFilter(dir string, rs []rule) error {
	var text []byte
	for _, i := range deviceProgram(rs) {
		text = append(text, i.code, i.regs)
		text = binary.NativeEndian.AppendUint16(text, uint16(i.off))
		text = binary.NativeEndian.AppendUint32(text, uint32(i.imm))
	}
	license := []byte("Apache-2.0\x00")
	load := struct {
		kind, count      uint32
		insns, license   uint64
		logLevel, logLen uint32
		log              uint64
		version, flags   uint32
	}{kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, count: uint32(len(text) / 8)}
	load.insns = uint64(uintptr(unsafe.Pointer(&text[0])))
	load.license = uint64(uintptr(unsafe.Pointer(&license[0])))
	prog, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&load), unsafe.Sizeof(load))
	runtime.KeepAlive(text)
	runtime.KeepAlive(license)
	if err != nil {
		return fmt.Errorf("linux.resources.devices: load device filter: %w", err)
	}
	defer unix.Close(prog)
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", dir, err)
	}
	defer unix.Close(fd)
	attach := struct{ target, prog, kind, flags uint32 }{uint32(fd), uint32(prog), unix.BPF_CGROUP_DEVICE, unix.BPF_F_ALLOW_MULTI}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attach), unsafe.Sizeof(attach)); err != nil {
		return fmt.Errorf("linux.resources.devices: attach device filter to %s: %w", dir, err)
	}
	return nil
}

// bpf repeats the call on EAGAIN: the verifier gives up when a signal, such as
// the Go runtime's preemption, is pending.
func bpf(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
		if e == unix.EAGAIN || e == unix.EINTR {
			continue
		}
		if e != 0 {
			return -1, e
		}
		return int(r), nil
	}
}
