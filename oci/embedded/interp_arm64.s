#include "textflag.h"

// The text of the start program: see interp_amd64.s. R20 op, R21 record.
// All constants fit one move: the bytes are copied, so no literal pool may be used.
TEXT ·interp(SB), NOSPLIT|NOFRAME, $0-0
	MOVD $0x10000000, R20
	MOVD $0x20000000, R21
	MOVD $1, R22

sigs:
	MOVD $134, R8 // rt_sigaction
	MOVD R22, R0
	ADD  $448, R21, R1
	MOVD $0, R2
	MOVD $8, R3
	SVC
	ADD  $1, R22
	CMP  $65, R22
	BNE  sigs

loop:
	MOVD 0(R20), R8
	MOVD 8(R20), R0
	MOVD 16(R20), R1
	MOVD 24(R20), R2
	MOVD 32(R20), R3
	MOVD 40(R20), R4
	MOVD 48(R20), R5
	MOVD 56(R20), R19
	TBZ  $0, R19, r1
	MOVD (R0), R0

r1:
	TBZ  $1, R19, r2
	MOVD (R1), R1

r2:
	TBZ  $2, R19, r3
	MOVD (R2), R2

r3:
	TBZ  $3, R19, r4
	MOVD (R3), R3

r4:
	CMN  $1, R8
	BNE  sys

	// A test: 0 if R0&R1 == R2, else -R3.
	AND  R1, R0, R9
	MOVD $0, R0
	CMP  R2, R9
	BEQ  done
	SUB  R3, R0
	B    done

sys:
	SVC

done:
	MOVD 64(R20), R9
	CBZ  R9, noret
	MOVD R0, (R9)

noret:
	CMN  $4095, R0
	BHS  fail
	ADD  $88, R20
	B    loop

fail:
	NEG  R0, R0
	MOVD 72(R20), R9
	CMN  $1, R9
	BEQ  ignored
	CMP  $63, R0
	BHI  report
	LSR  R0, R9, R9
	TBZ  $0, R9, report

ignored:
	MOVD 80(R20), R9
	ADD  R9, R20
	ADD  $88, R20
	B    loop

report:
	MOVD R20, 0(R21)
	MOVD R0, 8(R21)
	MOVD $64, R8 // write
	MOVD 440(R21), R0
	MOVD R21, R1
	MOVD $512, R2
	SVC
	MOVD $94, R8 // exit_group
	MOVD $127, R0
	SVC
	WORD $0xefbeadde

// func interpAddr() uintptr
TEXT ·interpAddr(SB), NOSPLIT, $0-8
	MOVD $·interp(SB), R0
	MOVD R0, ret+0(FP)
	RET
