package faults

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// stuckFS is a file system in memory that can stop answering the writes of one
// file, as a network disk does whose server is gone. It speaks the kernel's
// protocol (linux/fuse.h, version 7.31) as far as log files need it.
type stuckFS struct {
	t   *testing.T
	dir string
	dev int

	mu     sync.Mutex
	nodes  map[uint64]*fuseNode
	stuck  string   // name of the file whose writes are not answered
	held   [][]byte // requests without an answer
	served sync.WaitGroup
}

type fuseNode struct {
	name     string
	mode     uint32
	data     []byte
	children map[string]uint64
}

// Operations of the protocol.
const (
	fuseLookup = 1 + iota
	fuseForget
	fuseGetattr
	fuseSetattr
	_, fuseMkdir       = 0, 9
	_, fuseRename      = 0, 12
	_, fuseOpen        = 0, 14
	_, fuseRead        = 0, 15
	_, fuseWrite       = 0, 16
	_, fuseRelease     = 0, 18
	_, fuseFsync       = 0, 20
	_, fuseFlush       = 0, 25
	_, fuseInit        = 0, 26
	_, fuseOpendir     = 0, 27
	_, fuseReaddir     = 0, 28
	_, fuseReleasedir  = 0, 29
	_, fuseCreate      = 0, 35
	_, fuseInterrupt   = 0, 36
	_, fuseBatchForget = 0, 42
	_, fuseRename2     = 0, 45
)

var native = binary.NativeEndian

// mountStuck mounts one at dir; it is gone, whatever still waits for it, at the
// end of the test.
func mountStuck(t *testing.T, dir string) *stuckFS {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// Not through Go's poller: it asks the files that we serve whether they can be
	// polled, with the lock held that our own reading would wait for.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := &stuckFS{t: t, dir: dir, dev: fd,
		nodes: map[uint64]*fuseNode{1: {mode: unix.S_IFDIR | 0o755, children: map[string]uint64{}}}}
	if err := unix.Mount("berth-test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		t.Fatal(errors.Join(err, unix.Close(fd)))
	}
	f.served.Go(f.serve)
	t.Cleanup(func() {
		f.abort()
		_ = unix.Close(fd)
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && err != unix.EINVAL { // abort may have done it
			t.Error(err)
		}
	})
	return f
}

// abort ends the connection: whoever waits gets an error.
func (f *stuckFS) abort() {
	_ = unix.Unmount(f.dir, unix.MNT_FORCE) // busy: it aborts all the same
	f.served.Wait()
}

// stick lets the writes of the file called name wait from now on; "" is none, and
// answers those that wait.
func (f *stuckFS) stick(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stuck = name
	held := f.held
	f.held = nil
	for _, q := range held {
		f.answer(q)
	}
}

// waiting is how many requests have no answer.
func (f *stuckFS) waiting() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.held)
}

func (f *stuckFS) serve() {
	buf := make([]byte, 1<<20+4096)
	for {
		n, err := unix.Read(f.dev, buf)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR): // the asker has gone
			continue
		case err != nil:
			return
		}
		f.mu.Lock()
		f.answer(bytes.Clone(buf[:n]))
		f.mu.Unlock()
	}
}

// answer handles one request, or keeps it. Called with mu.
func (f *stuckFS) answer(q []byte) {
	op, unique, id := native.Uint32(q[4:]), native.Uint64(q[8:]), native.Uint64(q[16:])
	n := f.nodes[id]
	if op == fuseWrite && n != nil && f.stuck != "" && n.name == f.stuck {
		f.held = append(f.held, q)
		return
	}
	if op == fuseForget || op == fuseBatchForget || op == fuseInterrupt {
		return
	}
	body, errno := f.handle(op, n, id, q[40:])
	out := make([]byte, 16, 16+len(body))
	native.PutUint32(out, uint32(16+len(body)))
	native.PutUint32(out[4:], uint32(-int32(errno)))
	native.PutUint64(out[8:], unique)
	_, _ = unix.Write(f.dev, append(out, body...)) // it fails when nobody waits any more
}

func (f *stuckFS) handle(op uint32, n *fuseNode, id uint64, in []byte) ([]byte, unix.Errno) {
	if n == nil && op != fuseInit {
		return nil, unix.ENOENT
	}
	switch op {
	case fuseInit:
		out := make([]byte, 64)
		native.PutUint32(out, 7)
		native.PutUint32(out[4:], 31)
		native.PutUint32(out[20:], 128<<10) // max_write
		return out, 0
	case fuseLookup:
		c, ok := n.children[cstring(in)]
		if !ok {
			return nil, unix.ENOENT
		}
		return f.entry(c), 0
	case fuseGetattr:
		return f.attrOut(id), 0
	case fuseSetattr:
		if native.Uint32(in)&(1<<3) != 0 {
			size := native.Uint64(in[16:])
			n.data = append(n.data[:min(size, uint64(len(n.data)))], make([]byte, size-min(size, uint64(len(n.data))))...)
		}
		return f.attrOut(id), 0
	case fuseMkdir:
		return f.entry(f.add(n, cstring(in[8:]), unix.S_IFDIR|0o755)), 0
	case fuseCreate:
		return append(f.entry(f.add(n, cstring(in[16:]), unix.S_IFREG|0o640)), make([]byte, 16)...), 0
	case fuseOpen, fuseOpendir:
		return make([]byte, 16), 0
	case fuseRead:
		at := min(native.Uint64(in[8:]), uint64(len(n.data)))
		end := min(at+uint64(native.Uint32(in[16:])), uint64(len(n.data)))
		return n.data[at:end], 0
	case fuseWrite:
		at, size := native.Uint64(in[8:]), uint64(native.Uint32(in[16:]))
		if end := at + size; end > uint64(len(n.data)) {
			n.data = append(n.data, make([]byte, end-uint64(len(n.data)))...)
		}
		copy(n.data[at:], in[40:40+size])
		out := make([]byte, 8)
		native.PutUint32(out, uint32(size))
		return out, 0
	case fuseRename, fuseRename2:
		skip := 8
		if op == fuseRename2 {
			skip = 16
		}
		from := cstring(in[skip:])
		to, into := cstring(in[skip+len(from)+1:]), f.nodes[native.Uint64(in)]
		c, ok := n.children[from]
		if !ok || into == nil {
			return nil, unix.ENOENT
		}
		delete(n.children, from)
		into.children[to] = c
		return nil, 0
	case fuseRelease, fuseReleasedir, fuseReaddir, fuseFlush, fuseFsync:
		return nil, 0
	}
	return nil, unix.ENOSYS
}

func (f *stuckFS) add(parent *fuseNode, name string, mode uint32) uint64 {
	id := uint64(len(f.nodes) + 1)
	f.nodes[id] = &fuseNode{name: name, mode: mode, children: map[string]uint64{}}
	parent.children[name] = id
	return id
}

// attr is struct fuse_attr.
func (f *stuckFS) attr(id uint64) []byte {
	n := f.nodes[id]
	out := make([]byte, 88)
	native.PutUint64(out, id)
	native.PutUint64(out[8:], uint64(len(n.data)))
	native.PutUint32(out[60:], n.mode)
	native.PutUint32(out[64:], 1)
	native.PutUint32(out[80:], 4096)
	return out
}

func (f *stuckFS) attrOut(id uint64) []byte { return append(make([]byte, 16), f.attr(id)...) }

// entry is struct fuse_entry_out.
func (f *stuckFS) entry(id uint64) []byte {
	out := make([]byte, 40)
	native.PutUint64(out, id)
	return append(out, f.attr(id)...)
}

func cstring(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// TestStuckFSWorks: the fault of the tests below is the only one it has.
func TestStuckFSWorks(t *testing.T) {
	f := mountStuck(t, filepath.Join(t.TempDir(), "fs"))
	if err := os.MkdirAll(filepath.Join(f.dir, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(f.dir, "a/b/log")
	w, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"one\n", "two\n"} {
		if _, err := w.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Rename(path, path+".1"), w.Close()); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path + ".1"); err != nil || string(b) != "one\ntwo\n" {
		t.Fatalf("%q, %v", b, err)
	}
	f.stick("log")
	done := make(chan error, 1)
	go func() {
		w, err := os.OpenFile(path+".1", os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			_, err = w.WriteString("three\n")
			err = errors.Join(err, w.Close())
		}
		done <- err
	}()
	for f.waiting() == 0 {
		select {
		case err := <-done:
			t.Fatalf("a write to a stuck file returned: %v", err)
		default:
		}
	}
	f.abort()
	if err := <-done; !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("after the abort: %v", err)
	}
}
