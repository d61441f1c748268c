// Package unpack turns the tar stream of one layer into a directory that
// overlayfs can use as a lower layer.
//
// The stream is hostile. Every path is walked one component at a time from a
// descriptor of the layer's root without following links, or, where a link of
// the layer itself stands among the parents, resolved by
// openat2(RESOLVE_IN_ROOT); files are made and changed only through their
// parent's descriptor (invariant I1). Sizes, counts and lengths are bounded
// (I7). Nothing is synced: the layer store makes a whole image durable at once.
//
// One goroutine reads the tar and does everything but small files, which two
// writers create: file creation is what bounds unpacking. An entry that touches
// a name with a write in flight waits for the writers first, so the result is
// that of the tar's order.
package unpack

import (
	"archive/tar"
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/durable"
)

// Limits bound one layer. Zero values mean the defaults.
type Limits struct {
	// Bytes bounds the sum of file sizes and the tar stream itself: 256 GiB.
	Bytes int64
	// Entries bounds the number of tar entries: 4,000,000.
	Entries int64
}

const (
	defaultBytes   = 256 << 30
	defaultEntries = 4_000_000
	// maxTrailer is how much may follow the end mark of the tar: writers pad to
	// their block size, bombs pad for ever (CVE-2017-14992).
	maxTrailer = 16 << 20
	maxPath    = unix.PathMax - 1
	// smallFile is what a writer takes; larger files are streamed.
	smallFile = chunkSize
)

// Usage is what a layer takes on disk.
type Usage struct {
	Bytes, Inodes int64
	// Opaque reports that the layer's root hides everything below it.
	Opaque bool
}

type unpacker struct {
	ctx     context.Context
	limits  Limits
	root    *dir
	open    list.List // open directories, most recently used first
	aliases []*dir
	usage   Usage
	files   int64 // bytes of file content so far
	buf     []byte

	jobs chan *job
	wg   sync.WaitGroup

	mu      sync.Mutex
	done    sync.Cond
	pending map[pendingKey]struct{}
	failed  error
	// replaced are files that a later entry of the same name took the place of.
	replaced []unix.Stat_t
}

type pendingKey struct {
	d    *dir
	name string
}

// job is a small file to be written.
type job struct {
	d    *dir
	fd   int
	name string
	h    *tar.Header
	data *chunk
}

// Apply unpacks the tar stream r into the empty directory root and reads r to
// its end, so that whoever hashes the stream has seen all of it.
func Apply(ctx context.Context, root string, r io.Reader, l Limits) (Usage, error) {
	if l.Bytes <= 0 {
		l.Bytes = defaultBytes
	}
	if l.Entries <= 0 {
		l.Entries = defaultEntries
	}
	u := &unpacker{ctx: ctx, limits: l, buf: make([]byte, chunkSize), jobs: make(chan *job, 64), pending: map[pendingKey]struct{}{}}
	u.done.L = &u.mu
	if err := u.openRoot(root); err != nil {
		return Usage{}, err
	}
	defer u.closeDirs()
	u.count(4096)
	for range 2 {
		u.wg.Go(u.writer)
	}
	err := u.run(&bounded{r: r, left: l.Bytes})
	close(u.jobs)
	u.wg.Wait()
	if err == nil {
		err = u.failed
	}
	for i := range u.replaced {
		u.uncount(&u.replaced[i])
	}
	if err == nil {
		err = u.setTimes(u.root)
	}
	if durable.IsFull(err) {
		err = durable.Explain(&fs.PathError{Op: "unpack", Path: root, Err: err})
	}
	return u.usage, err
}

// bounded fails a stream that is longer than allowed.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n, fmt.Errorf("layer: larger than the limit: %w", errdefs.ErrResourceExhausted)
	}
	return n, err
}

func (u *unpacker) run(r io.Reader) error {
	tr := tar.NewReader(r)
	for n := int64(0); ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return tarError(err)
		}
		if n >= u.limits.Entries {
			return fmt.Errorf("layer: more than %d entries: %w", u.limits.Entries, errdefs.ErrResourceExhausted)
		}
		if err := u.ctx.Err(); err != nil {
			return err
		}
		if err := u.entry(h, tr); err != nil {
			return fmt.Errorf("layer entry %.300q: %w", h.Name, err)
		}
		u.dropAliases()
		u.mu.Lock()
		err = u.failed
		u.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if n, err := io.Copy(io.Discard, io.LimitReader(r, maxTrailer+1)); err != nil {
		return err
	} else if n > maxTrailer {
		return fmt.Errorf("layer: more than %d bytes after the end of the tar: %w", maxTrailer, errdefs.ErrInvalidArgument)
	}
	return u.drain()
}

// tarError gives errors of the format a kind; those of the source have one.
func tarError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("layer: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("layer: %w", err)
}

// cleanName makes an entry's name relative to the layer's root.
func cleanName(name string) (string, error) {
	if len(name) > maxPath {
		return "", fmt.Errorf("path longer than %d bytes: %w", maxPath, errdefs.ErrInvalidArgument)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("NUL in path: %w", errdefs.ErrInvalidArgument)
	}
	p := path.Clean(strings.TrimLeft(name, "/"))
	if p == ".." || strings.HasPrefix(p, "../") {
		return "", fmt.Errorf("path leaves the layer: %w", errdefs.ErrInvalidArgument)
	}
	return p, nil
}

func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if err := checkHeader(h); err != nil {
		return err
	}
	if name == "." {
		if h.Typeflag == tar.TypeXGlobalHeader {
			return nil
		}
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("the layer's root is not a directory: %w", errdefs.ErrInvalidArgument)
		}
		return u.setDir(u.root, h)
	}
	base := path.Base(name)
	if h.Typeflag == tar.TypeXGlobalHeader || strings.HasPrefix(base, ".wh..wh.") && base != opaqueMark {
		return nil // pax comments, and what aufs kept for itself
	}
	d, err := u.lookup(path.Dir(name), true)
	if err != nil {
		return err
	}
	if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
		return u.whiteout(d, hidden)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.directory(d, base, h)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return u.file(d, base, h, r)
	case tar.TypeSymlink:
		return u.node(d, base, h, func(fd int) error { return unix.Symlinkat(h.Linkname, fd, base) })
	case tar.TypeLink:
		return u.link(d, base, name, h)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		mode := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		dev := uint64(0)
		if h.Typeflag != tar.TypeFifo {
			dev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
		}
		return u.node(d, base, h, func(fd int) error { return unix.Mknodat(fd, base, mode|0o600, int(dev)) })
	}
	return fmt.Errorf("type %q is not known: %w", h.Typeflag, errdefs.ErrInvalidArgument)
}

// checkHeader refuses what chown and mknod would silently read as something
// else: 2^32-1 means "leave as it is", larger numbers wrap (invariant I6).
func checkHeader(h *tar.Header) error {
	const top = 1<<32 - 2
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > top || int64(h.Gid) > top {
		return fmt.Errorf("owner %d:%d is out of range: %w", h.Uid, h.Gid, errdefs.ErrInvalidArgument)
	}
	if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20 {
		return fmt.Errorf("device %d:%d is out of range: %w", h.Devmajor, h.Devminor, errdefs.ErrInvalidArgument)
	}
	if h.Size < 0 {
		return fmt.Errorf("size %d: %w", h.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

const opaqueMark = ".wh..wh..opq"

// settle waits for the writers if one of them is at work on name in d.
func (u *unpacker) settle(d *dir, name string) error {
	u.mu.Lock()
	_, busy := u.pending[pendingKey{d, name}]
	u.mu.Unlock()
	if busy {
		return u.drain()
	}
	return nil
}

// drain waits until no write is in flight.
func (u *unpacker) drain() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(u.pending) > 0 {
		u.done.Wait()
	}
	return u.failed
}

// make runs create, replacing what the tar put at name earlier.
func (u *unpacker) make(d *dir, name string, create func(fd int) error) (int, error) {
	if d.alias {
		if err := u.drain(); err != nil {
			return -1, err
		}
	} else if err := u.settle(d, name); err != nil {
		return -1, err
	}
	fd, err := u.fdOf(d)
	if err != nil {
		return -1, err
	}
	if err = create(fd); err == unix.EEXIST {
		if err = u.remove(d, name); err != nil {
			return -1, err
		}
		if fd, err = u.fdOf(d); err == nil {
			err = create(fd)
		}
	}
	return fd, err
}

// node makes a link, device or pipe.
func (u *unpacker) node(d *dir, name string, h *tar.Header, create func(fd int) error) error {
	fd, err := u.make(d, name, create)
	if err != nil {
		return err
	}
	u.count(0)
	return setMeta(fd, name, h)
}

// directory makes a directory or gives an existing one the entry's metadata.
func (u *unpacker) directory(d *dir, name string, h *tar.Header) error {
	c := d.children[name]
	if c == nil {
		if err := u.settle(d, name); err != nil {
			return err
		}
		var err error
		c, err = u.makeDir(d, name)
		if err == unix.EEXIST {
			c, err = u.replaceByDir(d, name)
		}
		if err != nil {
			return err
		}
	}
	return u.setDir(c, h)
}

// replaceByDir handles a directory entry whose name exists outside the cache.
func (u *unpacker) replaceByDir(d *dir, name string) (*dir, error) {
	c, err := u.child(d, name)
	if err != unix.ENOTDIR && err != unix.ELOOP {
		return c, err
	}
	fd, err := u.fdOf(d)
	if err != nil {
		return nil, err
	}
	was := isWhiteout(fd, name)
	if err := u.remove(d, name); err != nil {
		return nil, err
	}
	if c, err = u.makeDir(d, name); err == nil && was {
		err = u.setOpaque(c) // the lower directory stays hidden
	}
	return c, err
}

func isWhiteout(fd int, name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// link makes a hard link to an earlier entry of this layer.
func (u *unpacker) link(d *dir, base, name string, h *tar.Header) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return fmt.Errorf("link target: %w", err)
	}
	if target == name {
		return nil
	}
	missing := func() error {
		return fmt.Errorf("hard link to %.300q, which is not in this layer: %w", h.Linkname, errdefs.ErrInvalidArgument)
	}
	if target == "." {
		return missing()
	}
	td, err := u.lookup(path.Dir(target), false)
	if err == unix.ENOENT {
		return missing()
	}
	if err != nil {
		return err
	}
	tbase := path.Base(target)
	if err := u.settle(td, tbase); err != nil {
		return err
	}
	_, err = u.make(d, base, func(fd int) error {
		tfd, err := u.fdOf(td)
		if err != nil {
			return err
		}
		// Without AT_SYMLINK_FOLLOW a link to a link is that link.
		return unix.Linkat(tfd, tbase, fd, base, 0)
	})
	if err == unix.ENOENT {
		return missing()
	}
	return err
}

// whiteout hides name of the lower layers. What this layer itself holds stays:
// a whiteout speaks about lower layers only, wherever in the tar it stands.
func (u *unpacker) whiteout(d *dir, name string) error {
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("whiteout of %q: %w", name, errdefs.ErrInvalidArgument)
	}
	if name == ".wh..opq" {
		return u.setOpaque(d)
	}
	if err := u.settle(d, name); err != nil {
		return err
	}
	fd, err := u.fdOf(d)
	if err != nil {
		return err
	}
	err = unix.Mknodat(fd, name, unix.S_IFCHR, 0)
	if err == unix.EEXIST {
		c, cerr := u.child(d, name)
		if cerr == nil && c != nil {
			return u.setOpaque(c)
		}
		return nil
	}
	if err == nil {
		u.count(0)
	}
	return err
}

// setOpaque hides the content of d in the lower layers.
func (u *unpacker) setOpaque(d *dir) error {
	if d == u.root {
		u.usage.Opaque = true // overlayfs has no mark for a root: the store drops what is below
		return nil
	}
	fd, err := u.fdOf(d)
	if err != nil {
		return err
	}
	return unix.Lsetxattr(procPath(fd, "."), "trusted.overlay.opaque", []byte("y"), 0)
}

func (u *unpacker) count(size int64) {
	u.usage.Inodes++
	u.usage.Bytes += (size + 4095) &^ 4095
}

func (u *unpacker) uncount(st *unix.Stat_t) {
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
		return
	}
	u.usage.Inodes--
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		u.usage.Bytes -= (st.Size + 4095) &^ 4095
	case unix.S_IFDIR:
		u.usage.Bytes -= 4096
	}
}

var zeros = make([]byte, chunkSize)

// file writes a regular file: small ones by the writers, large ones here.
func (u *unpacker) file(d *dir, name string, h *tar.Header, r io.Reader) error {
	if u.files += h.Size; u.files > u.limits.Bytes {
		return fmt.Errorf("layer: files larger than the limit of %d bytes: %w", u.limits.Bytes, errdefs.ErrResourceExhausted)
	}
	if c := d.children[name]; c != nil || d.alias {
		if err := u.drain(); err != nil {
			return err
		}
		if c != nil {
			if err := u.remove(d, name); err != nil {
				return err
			}
		}
	}
	if h.Size <= smallFile && !d.alias {
		return u.enqueue(d, name, h, r)
	}
	fd := -1
	pfd, err := u.make(d, name, func(pfd int) (err error) {
		fd, err = createAt(pfd, name)
		return err
	})
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	written, err := u.stream(fd, h.Size, r)
	if err != nil {
		return err
	}
	u.count(written)
	return setFileMeta(fd, pfd, name, h)
}

// stream copies a file, leaving holes for blocks of zeros.
func (u *unpacker) stream(fd int, size int64, r io.Reader) (written int64, err error) {
	var off int64
	for off < size {
		if err := u.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := io.ReadFull(r, u.buf[:min(int64(len(u.buf)), size-off)])
		if err != nil {
			return 0, tarError(err)
		}
		if b := u.buf[:n]; !bytes.Equal(b, zeros[:n]) {
			if err := writeAll(fd, b, off); err != nil {
				return 0, err
			}
			written += int64(n)
		}
		off += int64(n)
	}
	return written, unix.Ftruncate(fd, size)
}

// enqueue hands a small file to the writers.
func (u *unpacker) enqueue(d *dir, name string, h *tar.Header, r io.Reader) error {
	c := chunks.Get().(*chunk)
	c.refs.Store(1)
	c.b = c.b[:h.Size]
	if _, err := io.ReadFull(r, c.b); err != nil {
		c.put()
		return tarError(err)
	}
	err := u.settle(d, name)
	fd := -1
	if err == nil {
		fd, err = u.fdOf(d)
	}
	if err != nil {
		c.put()
		return err
	}
	u.count(h.Size)
	u.mu.Lock()
	u.pending[pendingKey{d, name}] = struct{}{}
	d.refs++
	u.mu.Unlock()
	u.jobs <- &job{d: d, fd: fd, name: name, h: h, data: c}
	return nil
}

func (u *unpacker) writer() {
	for j := range u.jobs {
		u.mu.Lock()
		err := u.failed
		u.mu.Unlock()
		var gone unix.Stat_t
		replaced := false
		if err == nil {
			replaced, err = j.write(&gone)
		}
		j.data.put()
		u.mu.Lock()
		if replaced {
			u.replaced = append(u.replaced, gone)
		}
		if err != nil && u.failed == nil {
			u.failed = fmt.Errorf("layer entry %.300q: %w", j.h.Name, err)
		}
		delete(u.pending, pendingKey{j.d, j.name})
		j.d.refs--
		if len(u.pending) == 0 {
			u.done.Broadcast()
		}
		u.mu.Unlock()
	}
}

// write makes the file. What is there already is no directory: the reader of
// the tar has dealt with those.
func (j *job) write(gone *unix.Stat_t) (replaced bool, err error) {
	fd, err := createAt(j.fd, j.name)
	if err == unix.EEXIST {
		if err := unix.Fstatat(j.fd, j.name, gone, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return false, err
		}
		if err := unix.Unlinkat(j.fd, j.name, 0); err != nil {
			return false, err
		}
		replaced = true
		fd, err = createAt(j.fd, j.name)
	}
	if err != nil {
		return replaced, err
	}
	err = writeAll(fd, j.data.b, 0)
	if err == nil {
		err = setFileMeta(fd, j.fd, j.name, j.h)
	}
	return replaced, errors.Join(err, unix.Close(fd))
}

func createAt(pfd int, name string) (int, error) {
	return retry(func() (int, error) {
		return unix.Openat(pfd, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	})
}

func writeAll(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// times are the entry's, as the kernel takes them; both are the modification
// time, since an access time would differ from node to node.
func times(h *tar.Header) []unix.Timespec {
	t := h.ModTime
	// Beyond what 34 bits of seconds hold file systems clamp or refuse.
	if s := t.Unix(); s < -1<<31 || s >= 1<<33 {
		t = time.Unix(max(-1<<31, min(s, 1<<33-1)), 0)
	}
	ts := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	return []unix.Timespec{ts, ts}
}
