package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// filterName tells our device filters from those of others, such as systemd's.
const filterName = "berth_devices"

// loadFilter loads the program of the rules and returns its descriptor.
func loadFilter(rs []rule) (int, error) {
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
		name             [16]byte
	}{kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, count: uint32(len(text) / 8)}
	copy(load.name[:], filterName)
	load.insns = uint64(uintptr(unsafe.Pointer(&text[0])))
	load.license = uint64(uintptr(unsafe.Pointer(&license[0])))
	prog, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&load), unsafe.Sizeof(load))
	runtime.KeepAlive(text)
	runtime.KeepAlive(license)
	if err != nil {
		return -1, fmt.Errorf("linux.resources.devices: load device filter: %w", explain(err))
	}
	return prog, nil
}

// attachDeviceFilter loads the program and attaches it to a v2 cgroup. The
// cgroup holds the program; no fd stays open.
func attachDeviceFilter(dir string, rs []rule) error {
	return withFilter(dir, rs, func(cg, prog int) error {
		return attach(dir, cg, prog, -1)
	})
}

// replaceDeviceFilter puts a new filter in the place of ours, with no moment in
// which neither or only a stranger's is there. Several filters must all agree to
// an access, so those of others stay.
func replaceDeviceFilter(dir string, rs []rule) error {
	return withFilter(dir, rs, func(cg, prog int) error {
		old, err := ownFilters(cg)
		defer func() {
			for _, f := range old {
				unix.Close(f)
			}
		}()
		if err != nil {
			return fmt.Errorf("linux.resources.devices: find the device filter of %s: %w", dir, err)
		}
		if len(old) == 1 {
			// BPF_F_REPLACE is of Linux 5.6; kernels before it say EINVAL.
			if err := attach(dir, cg, prog, old[0]); !errors.Is(err, unix.EINVAL) {
				return err
			}
		}
		if err := attach(dir, cg, prog, -1); err != nil {
			return err
		}
		for _, f := range old {
			detach := struct{ target, prog, kind uint32 }{uint32(cg), uint32(f), unix.BPF_CGROUP_DEVICE}
			if _, err := bpf(unix.BPF_PROG_DETACH, unsafe.Pointer(&detach), unsafe.Sizeof(detach)); err != nil && err != unix.ENOENT {
				// The old one is still asked, too: take the new one back.
				back := struct{ target, prog, kind uint32 }{uint32(cg), uint32(prog), unix.BPF_CGROUP_DEVICE}
				_, berr := bpf(unix.BPF_PROG_DETACH, unsafe.Pointer(&back), unsafe.Sizeof(back))
				return errors.Join(fmt.Errorf("linux.resources.devices: detach the old device filter from %s: %w", dir, err), berr)
			}
		}
		return nil
	})
}

// orUnguarded makes a warning of a filter that was refused for want of
// privileges, in a user namespace or without root. Such a caller may have the
// cgroup (delegated), but can load no filter; nor can its containers make device
// nodes or open others than those of the user.
func (p *plan) orUnguarded(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	text, rerr := readFile("/proc/self/uid_map")
	if rerr != nil || ownsMachine(os.Geteuid(), text) {
		return err
	}
	p.warnings = append(p.warnings, "linux.resources.devices: no device filter: only root of the machine may load one")
	return nil
}

// ownsMachine reports whether a process with this user id and uid_map is root in
// the first user namespace.
func ownsMachine(uid int, uidMap string) bool {
	return uid == 0 && kernel.IsInitialIDMap(uidMap)
}

func withFilter(dir string, rs []rule, f func(cg, prog int) error) error {
	prog, err := loadFilter(rs)
	if err != nil {
		return err
	}
	defer unix.Close(prog)
	cg, err := open(dir, unix.O_DIRECTORY|unix.O_RDONLY)
	if err != nil {
		return explain(fmt.Errorf("cgroup %s: %w", dir, err))
	}
	defer unix.Close(cg)
	return f(cg, prog)
}

// attach attaches a program, in the place of another unless that is -1.
func attach(dir string, cg, prog, replace int) error {
	a := struct{ target, prog, kind, flags, replace uint32 }{uint32(cg), uint32(prog), unix.BPF_CGROUP_DEVICE, unix.BPF_F_ALLOW_MULTI, 0}
	if replace >= 0 {
		a.flags |= unix.BPF_F_REPLACE
		a.replace = uint32(replace)
	}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&a), unsafe.Sizeof(a)); err != nil {
		return fmt.Errorf("linux.resources.devices: attach device filter to %s: %w", dir, explain(err))
	}
	return nil
}

// ownFilters opens the device filters of ours that are attached to the cgroup cg.
func ownFilters(cg int) ([]int, error) {
	var ids [64]uint32 // the kernel's limit for one cgroup
	query := struct {
		target, kind, queryFlags, attachFlags uint32
		ids                                   uint64
		count                                 uint32
		_                                     uint32
	}{target: uint32(cg), kind: unix.BPF_CGROUP_DEVICE, ids: uint64(uintptr(unsafe.Pointer(&ids[0]))), count: uint32(len(ids))}
	_, err := bpf(unix.BPF_PROG_QUERY, unsafe.Pointer(&query), unsafe.Sizeof(query))
	runtime.KeepAlive(&ids)
	if err != nil {
		return nil, fmt.Errorf("bpf BPF_PROG_QUERY: %w", err)
	}
	var out []int
	for _, id := range ids[:query.count] {
		by := struct{ id, next, flags uint32 }{id: id}
		fd, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&by), unsafe.Sizeof(by))
		if err == unix.ENOENT {
			continue // detached meanwhile
		}
		if err != nil {
			return out, fmt.Errorf("bpf BPF_PROG_GET_FD_BY_ID: %w", err)
		}
		name, err := filterNameOf(fd)
		if err != nil || name != filterName {
			unix.Close(fd)
		} else {
			out = append(out, fd)
		}
		if err != nil {
			return out, err
		}
	}
	return out, nil
}

func filterNameOf(prog int) (string, error) {
	// The start of struct bpf_prog_info, up to the name.
	var info struct {
		kind, id                uint32
		tag                     [8]byte
		jitedLen, xlatedLen     uint32
		jited, xlated, loadTime uint64
		uid, mapCount           uint32
		maps                    uint64
		name                    [16]byte
	}
	get := struct {
		fd, size uint32
		info     uint64
	}{uint32(prog), uint32(unsafe.Sizeof(info)), uint64(uintptr(unsafe.Pointer(&info)))}
	_, err := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&get), unsafe.Sizeof(get))
	runtime.KeepAlive(&info)
	if err != nil {
		return "", fmt.Errorf("bpf BPF_OBJ_GET_INFO_BY_FD: %w", err)
	}
	return unix.ByteSliceToString(info.name[:]), nil
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
