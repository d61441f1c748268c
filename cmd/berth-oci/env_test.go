package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestHomeComesFromThePasswdInside(t *testing.T) {
	b := newBench(t, "env", "HOME")
	passwd := filepath.Join(b.bundle, "rootfs/etc/passwd")
	if err := os.WriteFile(passwd, []byte("root:x:0:0::/root:/bin/sh\nbad\nu:x:5:5::/home/u:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	b.do("run", b.id()).ok().prints("/root\n")
	b.spec.Process.User.UID = 5
	b.do("run", b.id()).ok().prints("/home/u\n")
	b.spec.Process.User.UID = 6
	b.do("run", b.id()).ok().prints("/\n")
	b.spec.Process.Env = append(b.spec.Process.Env, "HOME=/given")
	b.do("run", b.id()).ok().prints("/given\n")

	b.spec.Process.Env = append(b.spec.Process.Env, "HOME=", "nonsense", "=x")
	b.do("run", b.id()).ok().prints("/\n")

	b = newBench(t, "sleep")
	id := b.id()
	b.do("run", "-d", id).ok()
	if err := os.Symlink("/etc/passwd", filepath.Join(b.bundle, "rootfs/etc/passwd")); err != nil {
		t.Fatal(err) // of itself: read inside it leads nowhere, outside it would be the host's
	}
	b.do("exec", id, "prog", "env", "HOME").ok().prints("/\n")
	b.do("exec", "-e", "A=1", "-e", "A=2", id, "prog", "cat", "/proc/self/environ").ok().prints("PATH=/bin\x00A=2\x00HOME=/\x00")
}
