package attacks

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// A volume over /proc: the label of the process is written to a plain file in it,
// and so never applied.
// Nothing but procfs may be /proc, and then the container does not start.
func TestCVE_2019_16884(t *testing.T) {
	ways(t, func(b *bench) {
		b.args("fstype:/proc", "status:Pid")
		b.bind(b.volume("vol"), "/proc")
		b.run().refused("/proc")
		b.unmount("/proc")
		b.bind(b.volume("vol"), "/proc")
		b.run().refused("/proc")
		b.unmount("/proc")
		b.mount(specs.Mount{Destination: "/proc", Type: "tmpfs", Source: "tmpfs"})
		b.run().refused("/proc")
	})
}

// The destination of a mount is a symlink in the image and followed on the host.
// Links end inside the container's root; the canary is no mount point.
func TestCVE_2019_18837(t *testing.T) {
	ways(t, func(b *bench) {
		hosts := filepath.Join(b.volume("files"), "hosts")
		if err := os.WriteFile(hosts, []byte("127.0.0.1 bound\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		up := strings.Repeat("../", 30)
		b.symlink(up+b.canary.file, "etc/hosts")
		b.symlink(b.canary.dir, "made")
		b.symlink(b.canary.dir+"/sub", "deep")
		b.bind(hosts, "/etc/hosts", "ro")
		b.mount(specs.Mount{Destination: "/made/new/dir", Type: "tmpfs", Source: "tmpfs"})
		b.mount(specs.Mount{Destination: "/deep", Type: "tmpfs", Source: "tmpfs"})
		b.args("read:/etc/hosts", "mkdir:/made/new/dir/x", "secret:")
		b.run().ok().expect(map[string]string{"read:/etc/hosts": "127.0.0.1 bound|", "mkdir:/made/new/dir/x": "ok", "secret:": ""})
	})
}

// /proc of the image is a symlink to a directory that the image fills, so that
// what the runtime writes to procfs goes there.
// Such an image does not start, nor one with a link for /sys.
func TestCVE_2019_19921(t *testing.T) {
	ways(t, func(b *bench) {
		b.mkdir("bad-proc/self/attr")
		b.symlink("/bad-proc", "proc")
		b.run().refused("/proc", "no real directory")
		b.symlink("self-made", "proc")
		b.run().refused("/proc")
		if _, err := os.Lstat(b.in("self-made")); err == nil {
			t.Error("the target of a dangling /proc was made")
		}
	})
}

// The same by a volume that two containers share: one swaps the directory that
// the other's /proc lies in for a link (CVE-2023-27561, CVE-2023-28642).
// procfs is mounted at the path of the spec or not at all.
func TestCVE_2023_27561(t *testing.T) {
	b := newBench(t)
	vol := b.volume("vol")
	for _, d := range []string{"vol/a/proc", "vol/b/proc/sys/kernel"} {
		b.volume(d)
	}
	if err := os.Symlink("b", filepath.Join(vol, "a2")); err != nil {
		t.Fatal(err)
	}
	b.bind(vol, "/vol")
	b.args("swap:/vol/a,/vol/a2")
	b.start()
	b.mount(specs.Mount{Destination: "/vol/a/proc", Type: "proc", Source: "proc"})
	b.args("fstype:/proc", "procs:", "secret:")
	race(t, func(int) {
		r := b.run()
		if r.code != 0 && !strings.Contains(r.err, "/vol/a/proc") {
			t.Fatalf("%s%s", r.out, r.err)
		}
		if r.code == 0 {
			r.expect(map[string]string{"fstype:/proc": "0x9fa0", "secret:": ""})
			if got := r.value("procs:"); strings.Contains(got, "/vol/b") {
				t.Errorf("procfs is mounted at %s", got)
			}
		}
	})
}

// Both /proc and /sys of the image are symlinks.
// The container is not created.
func TestCVE_2025_54867(t *testing.T) {
	ways(t, func(b *bench) {
		b.symlink("/tmp", "sys")
		b.run().refused("/sys", "no real directory")
		b.symlink("/etc", "proc")
		b.run().refused("/proc", "no real directory")
	})
}

// /dev of the image is a symlink to a directory of the host when the default
// devices and links are made (CVE-2026-47766 too).
// No device and no link appears there.
func TestCVE_2026_41579(t *testing.T) {
	ways(t, func(b *bench) {
		b.symlink(b.canary.dir, "dev")
		b.args("stat:/dev/null", "secret:")
		b.run().ok().expect(map[string]string{"stat:/dev/null": "20666 1:3 0", "secret:": ""})
		b.unmount("/dev") // the image's own
		b.spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/my-null", Type: "c", Major: 1, Minor: 3, FileMode: ptr(os.FileMode(0o666))}}
		b.args("stat:/dev/my-null")
		b.run().ok().expect(map[string]string{"stat:/dev/my-null": "20666 1:3 0"})
	})
}

// The root is made read-only at the end, through /proc/self/fd/N, which is the
// image's: the change meets something else.
// A read-only root is read-only, and so is a mount that asks for it.
func TestCVE_2026_115521(t *testing.T) {
	ways(t, func(b *bench) {
		for _, d := range []string{"proc/self/fd", "proc/thread-self/fd"} {
			for _, fd := range []string{"3", "4", "5", "6", "7", "8", "9", "10", "11", "12"} {
				b.mkdir(d + "/" + fd)
			}
		}
		b.spec.Root.Readonly = true
		b.mkdir("data")
		b.bind(b.volume("vol"), "/data", "ro")
		b.args("write:/x,y", "write:/data/x,y", "remount:/")
		want := map[string]string{
			"write:/x,y": "error: open /x: read-only file system", "write:/data/x,y": "error: open /data/x: read-only file system",
			"remount:/": "error: operation not permitted",
		}
		b.run().ok().expect(want)
		b.unmount("/proc")
		b.spec.Linux.MaskedPaths, b.spec.Linux.ReadonlyPaths = nil, nil
		b.run().ok().expect(want)
	})
}

// A handler's configuration is read from the image through a symlink.
// What Berth reads of a root, which is nothing but directories to mount upon and
// to copy up, it reads inside of it.
func TestCVE_2025_24965(t *testing.T) {
	ways(t, func(b *bench) {
		up := strings.Repeat("../", 30)
		b.symlink(up+b.canary.dir, "copied")
		b.symlink(b.canary.dir, "work")
		b.mkdir(b.canary.dir) // in the image, where both links lead inside of it
		b.mount(specs.Mount{Destination: "/copied", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup"}})
		b.spec.Process.Cwd = "/work"
		b.args("ls:/copied", "cwd:", "secret:")
		b.run().ok().expect(map[string]string{"ls:/copied": "", "cwd:": b.canary.dir, "secret:": ""})
		// A path that is there on the host too.
		b.mount(specs.Mount{Destination: b.canary.dir, Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup"}})
		b.args("ls:"+b.canary.dir, "secret:")
		b.run().ok().expect(map[string]string{"ls:" + b.canary.dir: "", "secret:": ""})
	})
}

// The destination of a mount is exchanged for a symlink between the runtime's
// check and its mount, by another container with the same volume.
// The mount lands inside the container's root, and the host's files stay out of reach.
func TestCVE_2021_30465(t *testing.T) {
	for name, hooks := range map[string]bool{"plain": false, "hooks": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			vol := b.volume("vol")
			b.volume("vol/dest")
			if err := os.Symlink(strings.Repeat("../", 30)+b.canary.dir, filepath.Join(vol, "link")); err != nil {
				t.Fatal(err)
			}
			b.bind(vol, "/vol")
			b.args("swap:/vol/dest,/vol/link")
			b.start()
			if hooks {
				b.hook("nothing")
			}
			b.bind(b.volume("inner"), "/vol/dest")
			b.mount(specs.Mount{Destination: "/vol/dest/sub", Type: "tmpfs", Source: "tmpfs"})
			b.args("secret:")
			mounts := hostMounts(t)
			race(t, func(int) {
				if r := b.run(); r.code == 0 {
					r.expect(map[string]string{"secret:": ""})
				}
				if now := hostMounts(t); now != mounts {
					t.Fatalf("mounts of the host: %s", now)
				}
			})
		})
	}
}

// The directories of a mount point are made by name, and a swapped component
// has them, or an empty file, made on the host.
// Nothing appears in the canary.
func TestCVE_2024_45310(t *testing.T) {
	for name, hooks := range map[string]bool{"plain": false, "hooks": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			vol := b.volume("vol")
			b.volume("vol/dest")
			if err := os.Symlink(b.canary.dir, filepath.Join(vol, "link")); err != nil {
				t.Fatal(err)
			}
			b.bind(vol, "/vol")
			b.args("swap:/vol/dest,/vol/link")
			b.start()
			if hooks {
				b.hook("nothing")
			}
			before := b.canary.state(t)
			source := filepath.Join(b.volume("files"), "f")
			if err := os.WriteFile(source, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			plain := b.spec.Mounts
			race(t, func(try int) {
				deep := "/vol/dest/" + filepath.Join("d", string(rune('a'+try%26)), "x")
				b.spec.Mounts = append(plain[:len(plain):len(plain)],
					specs.Mount{Destination: deep, Type: "tmpfs", Source: "tmpfs"},
					specs.Mount{Destination: deep + "-file", Type: "bind", Source: source, Options: []string{"bind"}})
				b.args("secret:")
				if r := b.run(); r.code == 0 {
					r.expect(map[string]string{"secret:": ""})
				}
				if b.canary.state(t) != before {
					t.Fatal("the canary changed")
				}
				if err := os.RemoveAll(filepath.Join(vol, "dest/d")); err != nil && try < 0 {
					t.Fatal(err)
				}
			})
		})
	}
}
