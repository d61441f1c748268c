package embedded

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// refused checks that err is of the kind of a wrong spec and names the field.
func refused(t *testing.T, err error, field string) {
	t.Helper()
	if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), field) {
		t.Errorf("want an invalid argument naming %q, got: %v", field, err)
	}
}

// setSched has the kernel judge attr on a thread that is thrown away, and
// returns what the thread has then.
func setSched(t *testing.T, attr []byte) (got *unix.SchedAttr, err error) {
	t.Helper()
	err = kernel.OnThread(func() error {
		_, _, e := unix.RawSyscall(unix.SYS_SCHED_SETATTR, 0, uintptr(unsafe.Pointer(&attr[0])), 0)
		if e != 0 {
			return e
		}
		var err error
		got, err = unix.SchedGetAttr(0, 0)
		return err
	})
	return got, err
}

func TestScheduler(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		in   specs.Scheduler
		want unix.SchedAttr
	}{
		{specs.Scheduler{Policy: specs.SchedOther, Nice: 7}, unix.SchedAttr{Policy: 0, Nice: 7}},
		{specs.Scheduler{Policy: specs.SchedBatch, Nice: -3}, unix.SchedAttr{Policy: 3, Nice: -3}},
		{specs.Scheduler{Policy: specs.SchedIdle}, unix.SchedAttr{Policy: 5}},
		{specs.Scheduler{Policy: specs.SchedFIFO, Priority: 1, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}, unix.SchedAttr{Policy: 1, Priority: 1, Flags: 1}},
		{specs.Scheduler{Policy: specs.SchedRR, Priority: 99}, unix.SchedAttr{Policy: 2, Priority: 99}},
		{specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 1 << 20, Deadline: 1 << 26, Period: 1 << 27}, unix.SchedAttr{Policy: 6, Runtime: 1 << 20, Deadline: 1 << 26, Period: 1 << 27}},
		{specs.Scheduler{Policy: specs.SchedFIFO, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagKeepPolicy}}, unix.SchedAttr{}},
	} {
		b, err := schedAttr(&c.in)
		if err != nil {
			t.Errorf("%+v: %v", c.in, err)
			continue
		}
		got, err := setSched(t, b)
		if err == unix.EPERM || err == unix.EBUSY {
			// The thread's cgroup has no real-time budget, or no bandwidth is left.
			t.Logf("%+v: not allowed here: %v", c.in, err)
			continue
		}
		if err != nil {
			t.Errorf("%+v: the kernel says: %v", c.in, err)
			continue
		}
		got.Size, got.Util_min, got.Util_max = 0, 0, 0
		if c.in.Policy != specs.SchedDeadline {
			got.Runtime = 0 // newer kernels report the time slice there
		}
		if *got != c.want {
			t.Errorf("%+v: the thread has %+v, want %+v", c.in, *got, c.want)
		}
	}
}

// TestSchedulerRefused: each combination is also refused by the kernel, except
// where it would be taken and mean nothing.
func TestSchedulerRefused(t *testing.T) {
	needRoot(t)
	const ignored = "ignored by the kernel"
	for _, c := range []struct {
		in          specs.Scheduler
		field, note string
	}{
		{specs.Scheduler{}, "process.scheduler.policy", ignored},
		{specs.Scheduler{Policy: "SCHED_EXTRA"}, "process.scheduler.policy", ignored},
		{specs.Scheduler{Policy: specs.SchedISO}, "process.scheduler.policy", ""},
		{specs.Scheduler{Policy: specs.SchedOther, Nice: 20}, "process.scheduler.nice", ignored},
		{specs.Scheduler{Policy: specs.SchedOther, Nice: -21}, "process.scheduler.nice", ignored},
		{specs.Scheduler{Policy: specs.SchedOther, Priority: 1}, "process.scheduler.priority", ""},
		{specs.Scheduler{Policy: specs.SchedFIFO}, "process.scheduler.priority", ""},
		{specs.Scheduler{Policy: specs.SchedFIFO, Priority: 100}, "process.scheduler.priority", ""},
		{specs.Scheduler{Policy: specs.SchedFIFO, Priority: -1}, "process.scheduler.priority", ""},
		{specs.Scheduler{Policy: specs.SchedOther, Flags: []specs.LinuxSchedulerFlag{"SCHED_FLAG_X"}}, "process.scheduler.flags[0]", ignored},
		{specs.Scheduler{Policy: specs.SchedOther, Runtime: 1}, "process.scheduler.runtime", ignored},
		{specs.Scheduler{Policy: specs.SchedOther, Period: 1}, "process.scheduler.period", ignored},
		{specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 5000}, "process.scheduler.deadline", ""},
		{specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 1023, Deadline: 1 << 26}, "process.scheduler.runtime", ""},
		{specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 1 << 27, Deadline: 1 << 26}, "process.scheduler.deadline", ""},
		{specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 1 << 20, Deadline: 1 << 26, Period: 1 << 25}, "process.scheduler.period", ""},
		{specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 1 << 20, Deadline: 1 << 63}, "process.scheduler.deadline", ""},
	} {
		_, err := schedAttr(&c.in)
		refused(t, err, c.field)
		if c.note == ignored {
			continue
		}
		policy := schedPolicies[c.in.Policy]
		if c.in.Policy == specs.SchedISO {
			policy = 4
		}
		raw := unix.SchedAttr{
			Size: unix.SizeofSchedAttr, Policy: policy, Nice: c.in.Nice, Priority: uint32(c.in.Priority),
			Runtime: c.in.Runtime, Deadline: c.in.Deadline, Period: c.in.Period,
		}
		if _, err := setSched(t, bytesOf(&raw)); err != unix.EINVAL {
			t.Errorf("%+v: the kernel says %v, want EINVAL", c.in, err)
		}
	}
}

func TestIOPriority(t *testing.T) {
	for _, class := range []specs.IOPriorityClass{specs.IOPRIO_CLASS_BE, specs.IOPRIO_CLASS_IDLE} {
		v, err := ioPriority(&specs.LinuxIOPriority{Class: class, Priority: 5})
		if err != nil {
			t.Fatal(err)
		}
		err = kernel.OnThread(func() error {
			const whoProcess = 1
			if _, _, e := unix.RawSyscall(unix.SYS_IOPRIO_SET, whoProcess, 0, uintptr(v)); e != 0 {
				return e
			}
			got, _, e := unix.RawSyscall(unix.SYS_IOPRIO_GET, whoProcess, 0, 0)
			if e != 0 {
				return e
			}
			if int(got) != v {
				t.Errorf("%s: the thread has %#x, want %#x", class, got, v)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", class, err)
		}
	}
	if v, err := ioPriority(&specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_RT, Priority: 7}); v != 1<<13|7 || err != nil {
		t.Errorf("real time: %#x %v", v, err)
	}
	for _, p := range []int{-1, 8} {
		_, err := ioPriority(&specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: p})
		refused(t, err, "process.ioPriority.priority")
	}
	_, err := ioPriority(&specs.LinuxIOPriority{Class: "IOPRIO_CLASS_NONE"})
	refused(t, err, "process.ioPriority.class")
}

// setPolicy sets a memory policy on a thread that is thrown away and returns
// the mode and the first word of the nodes it has then.
func setPolicy(mode int, mask []byte, maxNode int) (gotMode int32, gotNodes uint64, err error) {
	err = kernel.OnThread(func() error {
		var p unsafe.Pointer
		if len(mask) > 0 {
			p = unsafe.Pointer(&mask[0])
		}
		_, _, e := unix.RawSyscall(unix.SYS_SET_MEMPOLICY, uintptr(mode), uintptr(p), uintptr(maxNode))
		runtime.KeepAlive(mask)
		if e != 0 {
			return e
		}
		nodes := make([]uint64, maxNodes/64)
		_, _, e = unix.RawSyscall6(unix.SYS_GET_MEMPOLICY, uintptr(unsafe.Pointer(&gotMode)), uintptr(unsafe.Pointer(&nodes[0])), maxNodes+1, 0, 0, 0)
		gotNodes = nodes[0]
		if e != 0 {
			return e
		}
		return nil
	})
	return gotMode, gotNodes, err
}

func TestMemoryPolicy(t *testing.T) {
	if _, _, err := setPolicy(unix.MPOL_DEFAULT, nil, 0); err == unix.ENOSYS {
		t.Skip("the kernel has no memory policies (CONFIG_NUMA)")
	} else if err != nil {
		t.Fatal(err)
	}
	flags := func(f ...specs.MemoryPolicyFlagType) []specs.MemoryPolicyFlagType { return f }
	for _, c := range []struct {
		in    specs.LinuxMemoryPolicy
		mode  int32
		nodes uint64
	}{
		{specs.LinuxMemoryPolicy{Mode: specs.MpolDefault}, 0, 0},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolLocal}, 4, 0},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolPreferred}, 4, 0},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolPreferred, Nodes: "0"}, 1, 1},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolPreferredMany, Nodes: "0"}, 5, 1},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: flags(specs.MpolFStaticNodes)}, 2 | 0x8000, 1},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolInterleave, Nodes: "0", Flags: flags(specs.MpolFRelativeNodes)}, 3 | 0x4000, 1},
	} {
		mode, mask, maxNode, err := memoryPolicy(&c.in)
		if err != nil {
			t.Errorf("%+v: %v", c.in, err)
			continue
		}
		gotMode, gotNodes, err := setPolicy(mode, mask, maxNode)
		if err != nil || gotMode != c.mode || gotNodes != c.nodes {
			t.Errorf("%+v: the thread has mode %#x nodes %#x, %v", c.in, gotMode, gotNodes, err)
		}
	}
	// The last node of a word must arrive: it is missing on this host, which the
	// kernel says, while a mask cut short would be an empty one or node 0.
	mode, mask, maxNode, err := memoryPolicy(&specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "63"})
	if err != nil || maxNode != 65 || binary.LittleEndian.Uint64(mask) != 1<<63 {
		t.Errorf("node 63: mask %x of %d: %v", mask, maxNode, err)
	}
	if _, _, err := setPolicy(mode, mask, maxNode); err != unix.EINVAL {
		t.Errorf("node 63: the kernel says %v", err)
	}
	for _, c := range []struct {
		in    specs.LinuxMemoryPolicy
		field string
	}{
		{specs.LinuxMemoryPolicy{Mode: "MPOL_NEAR"}, "linux.memoryPolicy.mode"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolDefault, Nodes: "0"}, "linux.memoryPolicy.nodes"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolLocal, Nodes: "0"}, "linux.memoryPolicy.nodes"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolBind}, "linux.memoryPolicy.nodes"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolWeightedInterleave, Nodes: " "}, "linux.memoryPolicy.nodes"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0-1024"}, "linux.memoryPolicy.nodes"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: flags("MPOL_F_X")}, "linux.memoryPolicy.flags[0]"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: flags(specs.MpolFStaticNodes, specs.MpolFRelativeNodes)}, "linux.memoryPolicy.flags"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolInterleave, Nodes: "0", Flags: flags(specs.MpolFNumaBalancing)}, "linux.memoryPolicy.flags"},
		{specs.LinuxMemoryPolicy{Mode: specs.MpolPreferred, Flags: flags(specs.MpolFStaticNodes)}, "linux.memoryPolicy.flags"},
	} {
		_, _, _, err := memoryPolicy(&c.in)
		refused(t, err, c.field)
	}
}

func TestPersonality(t *testing.T) {
	v, err := personalityOf(&specs.LinuxPersonality{Domain: specs.PerLinux32})
	if err != nil {
		t.Fatal(err)
	}
	err = kernel.OnThread(func() error {
		if _, _, e := unix.RawSyscall(unix.SYS_PERSONALITY, v, 0, 0); e != 0 {
			return e
		}
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return err
		}
		if m := unix.ByteSliceToString(u.Machine[:]); m != "i686" && m != "armv8l" {
			t.Errorf("uname says %s", m)
		}
		return nil
	})
	if err == unix.EINVAL && runtime.GOARCH == "arm64" {
		t.Log("this processor has no 32-bit mode")
	} else if err != nil {
		t.Error(err)
	}
	if v, err := personalityOf(&specs.LinuxPersonality{Domain: specs.PerLinux}); v != 0 || err != nil {
		t.Errorf("LINUX: %#x %v", v, err)
	}
	_, err = personalityOf(&specs.LinuxPersonality{Domain: "BSD"})
	refused(t, err, "linux.personality.domain")
	_, err = personalityOf(&specs.LinuxPersonality{Domain: specs.PerLinux, Flags: []specs.LinuxPersonalityFlag{"ADDR_NO_RANDOMIZE"}})
	refused(t, err, "linux.personality.flags[0]")
}

func TestCPUMask(t *testing.T) {
	for list, want := range map[string][]byte{
		"0":            {1, 0, 0, 0, 0, 0, 0, 0},
		"0-3,7":        {0x8f, 0, 0, 0, 0, 0, 0, 0},
		" 1 , 2 ":      {6, 0, 0, 0, 0, 0, 0, 0},
		"64,0,63-64":   {1, 0, 0, 0, 0, 0, 0, 0x80, 1, 0, 0, 0, 0, 0, 0, 0},
		"8191":         append(make([]byte, 1023), 0x80),
		"0000000000,1": {3, 0, 0, 0, 0, 0, 0, 0},
	} {
		if got, err := cpuMask("f", list); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q: %x %v", list, got, err)
		}
	}
	for _, list := range []string{
		"", ",", "0,", "a", "-1", "1-", "3-1", "0-8192", "1-9999999999", "4294967295", "18446744073709551615", "0-3:2", "+1", "0x1", "1\n2", "0--1", "1-2-3",
		strings.Repeat("0-8191,", 10000) + "0",
	} {
		_, err := cpuMask("process.execCPUAffinity.final", list)
		refused(t, err, "process.execCPUAffinity.final")
	}
	mask, err := cpuMask("f", "0")
	if err != nil {
		t.Fatal(err)
	}
	err = kernel.OnThread(func() error {
		_, _, e := unix.RawSyscall(unix.SYS_SCHED_SETAFFINITY, 0, uintptr(len(mask)), uintptr(unsafe.Pointer(&mask[0])))
		if e != 0 {
			return e
		}
		var set unix.CPUSet
		if err := unix.SchedGetaffinity(0, &set); err != nil {
			return err
		}
		if set.Count() != 1 || !set.IsSet(0) {
			t.Errorf("the thread runs on %v", set)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func FuzzCPUMask(f *testing.F) {
	f.Add("0-3,7")
	f.Add("1-9999999999")
	f.Fuzz(func(t *testing.T, list string) {
		mask, err := cpuMask("f", list)
		if err == nil && (len(mask) == 0 || len(mask)%8 != 0 || len(mask) > maxCPUs/8) {
			t.Errorf("%q: a mask of %d bytes", list, len(mask))
		}
	})
}
