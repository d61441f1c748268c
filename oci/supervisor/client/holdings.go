package client

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// holdings is what must outlive the supervisor. Descriptors are kept as numbers: a
// pipe in an os.File would be watched by the poller, which wakes up for each line
// that any container writes.
type holdings struct {
	mu         sync.Mutex
	containers map[id.Container]*holding // guarded by mu
	profiles   map[string]*profile       // guarded by mu; by digest
	lanes      map[int][wire.LaneFDs]int // guarded by mu; by number
	execs      map[execKey]*followed     // guarded by mu
}

// holding is a container: from its creation on with what made it, from its start
// on with all else.
type holding struct {
	wire.Holding        // without its profile
	digest       string // of the profile
	fds          []int  // as Files names them
	started      bool
}

// profile is shared by the containers that were made with it.
type profile struct {
	text json.RawMessage
	uses int
}

type followed struct {
	exit           chan wire.Exit
	pid            int
	pidfd, console int // -1: not there
	started        bool
}

// detached duplicates a descriptor out of an os.File, which stays as it is; -1
// when there is no room.
func detached(f *os.File) int {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1
	}
	d := -1
	_ = raw.Control(func(fd uintptr) {
		if n, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3); err == nil {
			d = n
		}
	})
	return d
}

func closeFDs(fds ...int) {
	for _, fd := range fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// request notes what a container is about to be made from.
func (h *holdings) request(c id.Container, op wire.Op, body json.RawMessage, digest string, text json.RawMessage) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.containers == nil {
		h.containers = map[id.Container]*holding{}
	}
	old := h.containers[c]
	if old != nil && old.started {
		return // a retry that came late
	}
	h.release(old)
	h.containers[c] = &holding{Holding: wire.Holding{ID: c, Op: op, Create: body}, digest: h.use(digest, text)}
}

// use counts a user of a profile. mu must be held.
func (h *holdings) use(digest string, text json.RawMessage) string {
	if text == nil {
		return ""
	}
	if h.profiles == nil {
		h.profiles = map[string]*profile{}
	}
	p := h.profiles[digest]
	if p == nil {
		p = &profile{text: text}
		h.profiles[digest] = p
	}
	p.uses++
	return digest
}

// release closes what is held of a container, nil for none. mu must be held.
func (h *holdings) release(c *holding) {
	if c == nil {
		return
	}
	closeFDs(c.fds...)
	c.fds, c.Files = nil, nil
	if p := h.profiles[c.digest]; p != nil {
		if p.uses--; p.uses == 0 {
			delete(h.profiles, c.digest)
		}
	}
}

// started completes what is held of a container; files stay the caller's. It
// reports false for one that was made before this daemon: the supervisor knows.
func (h *holdings) started(from wire.Holding, files []*os.File) bool {
	if len(from.Files) != len(files) {
		return false
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = detached(f)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.containers[from.ID]
	if c == nil || slices.Contains(fds, -1) {
		closeFDs(fds...)
		return false
	}
	closeFDs(c.fds...)
	from.Op, from.Create = c.Op, c.Create
	if from.Exit == nil {
		from.Exit = c.Exit // it was quicker
	}
	c.Holding, c.fds, c.started = from, fds, true
	c.trim()
	return true
}

// put replaces what is held of a container by what the supervisor tells.
func (h *holdings) put(from wire.Holding, digest string, files []*os.File) {
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = detached(f)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if slices.Contains(fds, -1) {
		closeFDs(fds...)
		return
	}
	if h.containers == nil {
		h.containers = map[id.Container]*holding{}
	}
	text := from.Profile
	from.Profile = nil
	c := &holding{Holding: from, digest: h.use(digest, text), fds: fds, started: true}
	h.release(h.containers[from.ID])
	h.containers[from.ID] = c
}

// exited notes the end of a container. What its runtime wants stays until it is
// deleted.
func (h *holdings) exited(e wire.Exit) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.containers[e.ID]
	if c == nil {
		return
	}
	c.Exit = &e
	c.trim()
}

// trim closes the streams of a container that has ended. mu must be held.
func (c *holding) trim() {
	if c.Exit == nil {
		return
	}
	var files []wire.File
	var fds []int
	for i, fd := range c.fds {
		if c.Files[i] == wire.FileRuntime {
			files, fds = append(files, c.Files[i]), append(fds, fd)
		} else {
			closeFDs(fd)
		}
	}
	c.Files, c.fds = files, fds
}

// stdinOnce tells whether a container's stdin is for one client.
func (h *holdings) stdinOnce(n id.Container) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.containers[n]
	var r struct {
		StdinOnce bool `json:"stdinOnce"`
	}
	return c != nil && json.Unmarshal(c.Create, &r) == nil && r.StdinOnce
}

// closeStdin lets go of a container's stdin.
func (h *holdings) closeStdin(n id.Container) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.containers[n]
	if c == nil {
		return
	}
	if i := slices.Index(c.Files, wire.FileStdin); i >= 0 {
		closeFDs(c.fds[i])
		c.Files, c.fds = slices.Delete(c.Files, i, i+1), slices.Delete(c.fds, i, i+1)
	}
}

func (h *holdings) forget(c id.Container) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.release(h.containers[c])
	delete(h.containers, c)
}

// handOver returns a container as the next supervisor wants it, with duplicates of
// its descriptors; ok is false for one that is gone or was not started.
func (h *holdings) handOver(n id.Container) (out wire.Holding, files []*os.File, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.containers[n]
	if c == nil || !c.started {
		return out, nil, false
	}
	files, ok = duplicates(c.fds)
	return c.Holding, files, ok
}

// profileTexts lists the profiles that containers were made with.
func (h *holdings) profileTexts() (out []wire.Profile) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for digest, p := range h.profiles {
		out = append(out, wire.Profile{Digest: digest, Text: p.text})
	}
	return out
}

// profileOf is the text of a container's profile; nil when it has none by digest.
func (h *holdings) profileOf(n id.Container) json.RawMessage {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.containers[n]; c != nil && h.profiles[c.digest] != nil {
		return h.profiles[c.digest].text
	}
	return nil
}

func duplicates(fds []int) (files []*os.File, ok bool) {
	for _, fd := range fds {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			wire.CloseFiles(files)
			return nil, false
		}
		files = append(files, os.NewFile(uintptr(d), "held"))
	}
	return files, true
}

// starts lists the containers that were started.
func (h *holdings) starts() (out []id.Container) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n, c := range h.containers {
		if c.started {
			out = append(out, n)
		}
	}
	return out
}

// addLanes holds further lanes, by their numbers; files stay the caller's.
func (h *holdings) addLanes(ids []int, files []*os.File) {
	for _, n := range ids {
		if len(files) < wire.LaneFDs {
			return
		}
		var l [wire.LaneFDs]int
		for i := range l {
			l[i] = detached(files[i])
		}
		files = files[wire.LaneFDs:]
		h.mu.Lock()
		old, ok := h.lanes[n]
		if h.lanes == nil {
			h.lanes = map[int][wire.LaneFDs]int{}
		}
		h.lanes[n] = l
		h.mu.Unlock()
		if ok {
			closeFDs(old[:]...)
		}
	}
}

// dropLanes ends the holding of lanes.
func (h *holdings) dropLanes(ids []int) {
	for _, n := range ids {
		h.mu.Lock()
		old, ok := h.lanes[n]
		delete(h.lanes, n)
		h.mu.Unlock()
		if ok {
			closeFDs(old[:]...)
		}
	}
}

// heldLanes lists the lanes that are held.
func (h *holdings) heldLanes() []int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.lanes))
}

// lane returns duplicates of a lane's descriptors.
func (h *holdings) lane(n int) ([]*os.File, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, ok := h.lanes[n]
	if !ok {
		return nil, false
	}
	return duplicates(l[:])
}

// exec makes room for the exit of an exec that is about to be asked for.
func (h *holdings) exec(k execKey) (<-chan wire.Exit, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.execs[k] != nil {
		return nil, fmt.Errorf("exec %s: %w", k.exec, errdefs.ErrAlreadyExists)
	}
	if h.execs == nil {
		h.execs = map[execKey]*followed{}
	}
	f := &followed{exit: make(chan wire.Exit, 1), pidfd: -1, console: -1}
	h.execs[k] = f
	return f.exit, nil
}

func (h *holdings) noExec(k execKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if x := h.execs[k]; x != nil {
		closeFDs(x.pidfd, x.console)
	}
	delete(h.execs, k)
}

// execStarted notes a running exec; the files stay the caller's. It may have ended.
func (h *holdings) execStarted(k execKey, pid int, console *os.File, files []*os.File) {
	pidfd, tty := -1, -1
	if len(files) > 0 {
		pidfd = detached(files[0])
		if console != nil {
			tty = detached(console)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	x := h.execs[k]
	if x == nil {
		closeFDs(pidfd, tty)
		return
	}
	x.pid, x.pidfd, x.console, x.started = pid, pidfd, tty, true
}

// execExited delivers the exit of an exec.
func (h *holdings) execExited(e wire.Exit) {
	k := execKey{e.ID, e.Exec}
	h.mu.Lock()
	x := h.execs[k]
	delete(h.execs, k)
	h.mu.Unlock()
	if x != nil {
		closeFDs(x.pidfd, x.console)
		x.exit <- e
	}
}

// execLost ends the wait for an exec that no supervisor knows.
func (h *holdings) execLost(k execKey) {
	h.execExited(wire.Exit{ID: k.container, Exec: k.exec, Code: ExitUnknown, Unknown: true, FinishedAt: time.Now().UTC()})
}

// following lists the running execs.
func (h *holdings) following() (out []execKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k, x := range h.execs {
		if x.started {
			out = append(out, k)
		}
	}
	return out
}

// follow returns what a supervisor must be told of an exec, with its pidfd and its
// terminal; ok is false when it has ended, or cannot be followed.
func (h *holdings) follow(k execKey) (r wire.Follow, files []*os.File, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	x := h.execs[k]
	if x == nil || x.pidfd < 0 {
		return r, nil, false
	}
	fds := []int{x.pidfd}
	if x.console >= 0 {
		fds = append(fds, x.console)
	}
	files, ok = duplicates(fds)
	return wire.Follow{ID: k.container, Exec: k.exec, Pid: x.pid, Terminal: x.console >= 0}, files, ok
}

// close lets go of everything; the supervisor has its own.
func (h *holdings) close() {
	for _, k := range h.following() {
		h.execLost(k)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.containers {
		h.release(c)
	}
	for _, l := range h.lanes {
		closeFDs(l[:]...)
	}
	h.containers, h.lanes = nil, nil
}
