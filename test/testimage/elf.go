package testimage

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Exiter is a static ELF of under 200 bytes that exits with status 0, and Pauser
// one that waits for SIGTERM or SIGINT and then exits with status 0. They are for
// measuring: a Go program takes a millisecond to reach main and a megabyte to
// stay there, more than what is to be seen of the runtime. goarch is amd64 or
// arm64.
func Exiter(goarch string) ([]byte, error) { return tiny(goarch, exiter) }

// Pauser is described with Exiter.
func Pauser(goarch string) ([]byte, error) { return tiny(goarch, pauser) }

// arm64 instructions as words; system call numbers are the generic table's.
var exiter = map[string][]byte{
	"amd64": {
		0x31, 0xff, // xor edi, edi
		0xb8, 231, 0, 0, 0, // mov eax, exit_group
		0x0f, 0x05, // syscall
	},
	"arm64": words(
		0xd2800000, // mov x0, #0
		0xd2800bc8, // mov x8, #94 (exit_group)
		0xd4000001, // svc #0
	),
}

// Both block {SIGINT, SIGTERM} and wait for them: a first process in a PID
// namespace never gets a signal that it neither handles nor waits for.
var pauser = map[string][]byte{
	"amd64": {
		0x68, 0x02, 0x40, 0, 0, // push 1<<(SIGINT-1) | 1<<(SIGTERM-1)
		0x31, 0xff, // xor edi, edi (SIG_BLOCK)
		0x48, 0x89, 0xe6, // mov rsi, rsp
		0x31, 0xd2, // xor edx, edx
		0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
		0xb8, 14, 0, 0, 0, // mov eax, rt_sigprocmask
		0x0f, 0x05, // syscall
		0x48, 0x89, 0xe7, // wait: mov rdi, rsp
		0x31, 0xf6, // xor esi, esi
		0x31, 0xd2, // xor edx, edx
		0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
		0xb8, 128, 0, 0, 0, // mov eax, rt_sigtimedwait
		0x0f, 0x05, // syscall
		0x83, 0xf8, 0xfc, // cmp eax, -EINTR
		0x74, 0xe7, // je wait
		0x31, 0xff, // xor edi, edi
		0xb8, 231, 0, 0, 0, // mov eax, exit_group
		0x0f, 0x05, // syscall
	},
	"arm64": words(
		0xd2880049, // mov x9, #0x4002: 1<<(SIGINT-1) | 1<<(SIGTERM-1)
		0xf81f0fe9, // str x9, [sp, #-16]!
		0xd2800000, // mov x0, #0 (SIG_BLOCK)
		0x910003e1, // mov x1, sp
		0xd2800002, // mov x2, #0
		0xd2800103, // mov x3, #8
		0xd28010e8, // mov x8, #135 (rt_sigprocmask)
		0xd4000001, // svc #0
		0x910003e0, // wait: mov x0, sp
		0xd2800001, // mov x1, #0
		0xd2800002, // mov x2, #0
		0xd2800103, // mov x3, #8
		0xd2801128, // mov x8, #137 (rt_sigtimedwait)
		0xd4000001, // svc #0
		0xb100101f, // cmn x0, #EINTR
		0x54ffff20, // b.eq wait
		0xd2800000, // mov x0, #0
		0xd2800bc8, // mov x8, #94 (exit_group)
		0xd4000001, // svc #0
	),
}

func words(w ...uint32) []byte {
	var b []byte
	for _, v := range w {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// tiny wraps code in an ELF with one read-and-execute segment.
func tiny(goarch string, code map[string][]byte) ([]byte, error) {
	text, ok := code[goarch]
	if !ok {
		return nil, fmt.Errorf("tiny program: architecture %q: want amd64 or arm64", goarch)
	}
	machine := map[string]uint16{"amd64": 62, "arm64": 183}[goarch]
	const base, headers = 0x400000, 64 + 56
	size := uint64(headers + len(text))
	var b bytes.Buffer
	for _, v := range []any{
		[16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1},                // 64 bits, little endian
		uint16(2), machine, uint32(1), uint64(base + headers), // ET_EXEC, version, entry
		uint64(64), uint64(0), uint32(0), // program headers, no sections, flags
		uint16(64), uint16(56), uint16(1), [3]uint16{64, 0, 0}, // sizes
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(0x10000), // PT_LOAD, R+X
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			return nil, err
		}
	}
	b.Write(text)
	return b.Bytes(), nil
}
