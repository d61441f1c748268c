package attacks

import (
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/test/testimage"
)

// /dev/null of the image, from which masks are made, is a symlink to a file of
// procfs: masking then binds that file where it can be written (CVE-2025-62161 too).
// A masked file is the null device, whatever the image has.
func TestCVE_2025_31133(t *testing.T) {
	ways(t, func(b *bench) {
		b.unmount("/dev")
		b.file("etc/evil", "of the image")
		b.file("etc/masked", "not to be seen")
		b.spec.Linux.MaskedPaths = append(b.spec.Linux.MaskedPaths, "/etc/masked", "/proc/sched_debug", "/proc/version")
		b.args("read:/etc/masked", "stat:/etc/masked", "read:/proc/version", "read:/proc/timer_list", "open:/proc/sys/kernel/core_pattern", "write:/etc/masked,|/evil")
		for _, target := range []string{"/proc/sys/kernel/core_pattern", "/etc/evil"} {
			b.symlink(target, "dev/null")
			r := b.run().ok().expect(map[string]string{"read:/etc/masked": "", "read:/proc/version": "", "read:/proc/timer_list": ""})
			if got := r.value("open:/proc/sys/kernel/core_pattern"); got == "ok" {
				t.Error("core_pattern can be written")
			}
			if got := r.value("stat:/etc/masked"); !strings.HasPrefix(got, "20666 1:3") {
				t.Errorf("the mask is %s", got)
			}
		}
	})
}

// The same over CRI.
func TestCVE_2025_31133_CRI(t *testing.T) {
	n := needNode(t)
	ref := n.mustPush(t, "mask", nil, testimage.Entry{Name: "dev/"},
		testimage.Entry{Name: "dev/null", Type: '2', Target: "/proc/sys/kernel/core_pattern"}, testimage.Entry{Name: "etc/masked", Body: []byte("not to be seen")})
	c := n.config("hold:")
	c.Image.Image = ref
	c.Linux.SecurityContext.MaskedPaths = append(c.Linux.SecurityContext.MaskedPaths, "/etc/masked", "/proc/version")
	id := n.start(t, n.runPod(t), c)
	n.exec(t, id, "read:/etc/masked", "read:/proc/version", "stat:/dev/null").ok().expect(map[string]string{
		"read:/etc/masked": "", "read:/proc/version": "", "stat:/dev/null": "20666 1:3 0",
	})
}

// /dev/console or /dev/pts/N of the image is a symlink, or becomes one, and the
// terminal is bound, or a file made, where it leads (CVE-2026-88264 too).
// The terminal is ours, at /dev/console of the container, and nothing else is made.
func TestCVE_2025_52565(t *testing.T) {
	ways(t, func(b *bench) {
		b.spec.Process.Terminal = true
		b.args("tty:", "secret:")
		onTerminal(t, b).expect(map[string]string{"tty:": "ok", "secret:": ""})
		// With the image's own /dev.
		b.spec.Mounts = append(b.spec.Mounts[:1:1], specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}})
		b.symlink(b.canary.dir+"/console", "dev/console")
		onTerminal(t, b).expect(map[string]string{"tty:": "ok", "secret:": ""})
		b.symlink(strings.Repeat("../", 30)+b.canary.file, "dev/console")
		onTerminal(t, b).expect(map[string]string{"tty:": "ok", "secret:": ""})
		b.symlink(b.canary.dir, "dev/pts") // the console's link leads to the devpts, where nothing can be made
		onTerminal(t, b).refused("/dev/console")
	})
}

// The same while another container swaps the directory that the console is in.
func TestCVE_2025_52565_race(t *testing.T) {
	b := newBench(t)
	vol := b.volume("vol")
	b.volume("vol/dev")
	if err := os.Symlink(strings.Repeat("../", 30)+b.canary.dir, filepath.Join(vol, "link")); err != nil {
		t.Fatal(err)
	}
	b.bind(vol, "/vol")
	b.args("swap:/vol/dev,/vol/link")
	b.start()
	b.hook("nothing") // with the host's tree around
	b.unmount("/dev")
	b.symlink("/vol/dev", "dev")
	b.mount(specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}})
	b.spec.Process.Terminal = true
	b.args("secret:")
	before := b.canary.state(t)
	race(t, func(int) {
		if r := onTerminal(t, b); r.code == 0 {
			r.expect(map[string]string{"secret:": ""})
		}
		if b.canary.state(t) != before {
			t.Fatal("the canary changed")
		}
	})
}

// onTerminal runs a container with a terminal; its output is what the terminal shows.
func onTerminal(t *testing.T, b *bench) result {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth-a") // the name of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	shown := make(chan string, 1)
	go func() { shown <- terminal(l) }()
	id := b.id()
	r := b.do("run", "--detach", "--console-socket", sock, id)
	if r.code != 0 {
		l.Close()
		<-shown
		return r
	}
	r.out = strings.ReplaceAll(<-shown, "\r\n", "\n")
	b.do("delete", "--force", id).ok()
	return r
}

// terminal takes a terminal from the socket and reads it until it hangs up.
func terminal(l *net.UnixListener) string {
	c, err := l.AcceptUnix()
	if err != nil {
		return ""
	}
	defer c.Close()
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil || n < unix.CmsgLen(4) {
		return ""
	}
	tty := os.NewFile(uintptr(binary.LittleEndian.Uint32(oob[unix.CmsgLen(0):])), "tty")
	defer tty.Close()
	var out []byte
	for {
		n, err := tty.Read(buf)
		out = append(out, buf[:n]...)
		if err != nil { // EIO: hung up
			return string(out)
		}
	}
}

// /dev/null of the image is a symlink to a file that is bound from the host: as
// stdin it is opened for writing, or given to the container's user.
// Stdio is the host's null device, and the file keeps its owner and content.
func TestCVE_2026_88265(t *testing.T) {
	ways(t, func(b *bench) {
		vol := b.volume("vol")
		bound := filepath.Join(vol, "bound")
		if err := os.WriteFile(bound, []byte("of the host\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(bound, firstID, firstID); err != nil {
			t.Fatal(err)
		}
		var before, after, null, null2 unix.Stat_t
		if err := unix.Stat(bound, &before); err != nil {
			t.Fatal(err)
		}
		if err := unix.Stat("/dev/null", &null); err != nil {
			t.Fatal(err)
		}
		b.bind(bound, "/bound")
		b.unmount("/dev")
		b.symlink("/bound", "dev/null")
		b.spec.Process.User = specs.User{UID: 1000, GID: 1000}
		b.args("hold:")
		id := b.id()
		if err := b.command("run", "--detach", id).Run(); err != nil { // all of stdio is /dev/null
			t.Fatal(err)
		}
		b.do("exec", "--detach", id, attackerName, "nothing:").ok()
		if got := b.do("exec", id, attackerName, "stat:/proc/1/fd/0").ok().value("stat:/proc/1/fd/0"); !strings.HasPrefix(got, "20666 1:3") {
			t.Errorf("stdin is %s", got)
		}
		if err := unix.Stat(bound, &after); err != nil {
			t.Fatal(err)
		}
		if err := unix.Stat("/dev/null", &null2); err != nil {
			t.Fatal(err)
		}
		if before.Uid != after.Uid || before.Gid != after.Gid || before.Mode != after.Mode || before.Mtim != after.Mtim || before.Size != after.Size {
			t.Errorf("the bound file: before %+v, after %+v", before, after)
		}
		if null.Uid != null2.Uid || null.Mode != null2.Mode {
			t.Errorf("the host's /dev/null: before %+v, after %+v", null, null2)
		}
	})
}

// The list of devices is read as what is forbidden, so that none is.
// Without a list, or with an empty one, only the standard devices can be opened.
func TestGHSA_g54h_m393_cpwq(t *testing.T) {
	for name, r := range map[string]*specs.LinuxResources{
		"no resources": nil, "no list": {}, "empty list": {Devices: []specs.LinuxDeviceCgroup{}},
		"deny all":  {Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
		"allow one": {Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(200)), Access: "rwm"}}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, "mknod:b,8,0", "mknod:c,1,1", "mknod:c,1,2", "mknod:c,4,64", "open:/dev/null", "open:/dev/urandom")
			b.spec.Linux.Resources = r
			b.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: allCaps, Effective: allCaps, Permitted: allCaps}
			res := b.run().ok()
			for _, q := range []string{"mknod:b,8,0", "mknod:c,1,1", "mknod:c,1,2", "mknod:c,4,64"} {
				// Nodes may be made (as of every device by default); opening them may not succeed.
				if got := res.value(q); !strings.HasSuffix(got, "operation not permitted") {
					t.Errorf("%s: %s", q, got)
				}
			}
			res.expect(map[string]string{"open:/dev/null": "ok", "open:/dev/urandom": "ok"})
		})
	}
}
