package cgroup

import (
	"slices"

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
