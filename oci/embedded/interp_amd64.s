#include "textflag.h"

// The text of the start program: it runs the script at 0x10000000 and reports
// the first failure as a record at 0x20000000 written to the status pipe, whose
// number the record holds. See script.go for the form of an op. Registers only: R12 op, R13 record. It is never run in
// this process; the bytes up to the end mark are copied into an ELF file.
TEXT ·interp(SB), NOSPLIT|NOFRAME, $0-0
	MOVQ $0x10000000, R12
	MOVQ $0x20000000, R13

	// Signal dispositions: SIG_DFL for all, so that none inherited as ignored
	// reaches the user's program. The record's tail serves as the zero sigaction.
	MOVQ $1, R14

sigs:
	MOVQ $13, AX // rt_sigaction
	MOVQ R14, DI
	LEAQ 448(R13), SI
	XORL DX, DX
	MOVQ $8, R10
	SYSCALL
	INCQ R14
	CMPQ R14, $65
	JNE  sigs

loop:
	MOVQ 0(R12), AX
	MOVQ 8(R12), DI
	MOVQ 16(R12), SI
	MOVQ 24(R12), DX
	MOVQ 32(R12), R10
	MOVQ 40(R12), R8
	MOVQ 48(R12), R9
	MOVQ 56(R12), BX
	BTQ  $0, BX
	JCC  r1
	MOVQ (DI), DI

r1:
	BTQ  $1, BX
	JCC  r2
	MOVQ (SI), SI

r2:
	BTQ  $2, BX
	JCC  r3
	MOVQ (DX), DX

r3:
	BTQ  $3, BX
	JCC  r4
	MOVQ (R10), R10

r4:
	CMPQ AX, $-1
	JNE  sys

	// A test: 0 if DI&SI == DX, else -R10.
	ANDQ SI, DI
	XORL AX, AX
	CMPQ DI, DX
	JEQ  done
	SUBQ R10, AX
	JMP  done

sys:
	SYSCALL

done:
	MOVQ 64(R12), CX
	TESTQ CX, CX
	JZ   noret
	MOVQ AX, (CX)

noret:
	CMPQ AX, $-4095
	JCC  fail
	ADDQ $88, R12
	JMP  loop

fail:
	NEGQ AX
	MOVQ 72(R12), DX
	CMPQ DX, $-1
	JEQ  ignored
	CMPQ AX, $63
	JHI  report
	BTQ  AX, DX
	JCC  report

ignored:
	ADDQ 80(R12), R12
	ADDQ $88, R12
	JMP  loop

report:
	MOVQ R12, 0(R13)
	MOVQ AX, 8(R13)
	MOVQ $1, AX // write
	MOVQ 440(R13), DI
	MOVQ R13, SI
	MOVQ $512, DX
	SYSCALL
	MOVQ $231, AX // exit_group
	MOVQ $127, DI
	SYSCALL
	BYTE $0xde; BYTE $0xad; BYTE $0xbe; BYTE $0xef

// func interpAddr() uintptr
TEXT ·interpAddr(SB), NOSPLIT, $0-8
	LEAQ ·interp(SB), AX
	MOVQ AX, ret+0(FP)
	RET
