package supervisor

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children knows which children are ours to wait for, so that processes that
// were reparented to us (we are a child subreaper) can be told apart and reaped.
//
// Between the fork inside a runtime and add, a child of ours is unknown. A
// zombie is therefore an orphan only when no fork is in flight that was already
// in flight when the zombie was first seen.
type children struct {
	mu       sync.Mutex
	known    map[int]struct{}
	ticket   uint64
	inFlight map[uint64]struct{}
	seen     map[int]uint64 // unknown zombie -> ticket at first sight
}

func newChildren() *children {
	return &children{known: map[int]struct{}{}, inFlight: map[uint64]struct{}{}, seen: map[int]uint64{}}
}

// forking must be called before a child is made; add registers children made
// in between and done ends it.
func (c *children) forking() (done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ticket++
	t := c.ticket
	c.inFlight[t] = struct{}{}
	return func() {
		c.mu.Lock()
		delete(c.inFlight, t)
		c.mu.Unlock()
	}
}

func (c *children) add(pid int) {
	c.mu.Lock()
	c.known[pid] = struct{}{}
	delete(c.seen, pid)
	c.mu.Unlock()
}

// wait waits until the child pid has ended, and reaps and forgets it in one
// step: its pid may belong to a new child a moment after it was reaped. In the same
// step note, which may be nil, is told how it ended.
func (c *children) wait(pid int, note func(unix.WaitStatus)) (unix.WaitStatus, error) {
	for {
		status, gone, err := c.tryWait(pid, note)
		if gone || err != nil {
			return status, err
		}
		// WALL: a runtime may have cloned the child with another exit signal than SIGCHLD.
		err = unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT|unix.WALL, nil)
		if err != nil && err != unix.EINTR {
			return 0, err
		}
	}
}

func (c *children) tryWait(pid int, note func(unix.WaitStatus)) (status unix.WaitStatus, gone bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	got, err := unix.Wait4(pid, &status, unix.WNOHANG|unix.WALL, nil)
	if err == unix.EINTR || err == nil && got == 0 {
		return 0, false, nil
	}
	delete(c.known, pid)
	delete(c.seen, pid)
	if err == nil && note != nil {
		note(status)
	}
	return status, true, err
}

// reapOrphans reaps until ctx ends.
func (c *children) reapOrphans(ctx context.Context) {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGCHLD)
	defer signal.Stop(sig)
	retry := time.NewTimer(0)
	defer retry.Stop()
	delay := time.Millisecond
	for {
		select {
		case <-ctx.Done():
			return
		case <-sig:
			delay = time.Millisecond
		case <-retry.C:
		}
		if c.reap() {
			retry.Stop()
			continue
		}
		// A zombie that is not (or not yet surely) an orphan hides those behind it.
		retry.Reset(delay)
		delay = min(2*delay, 250*time.Millisecond)
	}
}

// reap reports whether no zombie is left.
func (c *children) reap() bool {
	for {
		switch found, reaped := c.reapOne(); {
		case !found:
			return true
		case !reaped:
			return false
		}
	}
}

// reapOne looks, decides and reaps under the lock: the zombie that was looked
// at could be reaped by its owner and its pid given to a new child in between.
// None of its system calls blocks.
func (c *children) reapOne() (found, reaped bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, ok := zombie()
	if !ok {
		clear(c.seen)
		return false, false
	}
	if !c.orphan(pid) {
		return true, false
	}
	_, _ = unix.Wait4(pid, nil, unix.WNOHANG|unix.WALL, nil)
	return true, true
}

// orphan must be called with the lock held.
func (c *children) orphan(pid int) bool {
	if _, ok := c.known[pid]; ok {
		delete(c.seen, pid)
		return false
	}
	first, ok := c.seen[pid]
	if !ok {
		first = c.ticket
		c.seen[pid] = first
	}
	for t := range c.inFlight {
		if t <= first {
			return false
		}
	}
	delete(c.seen, pid)
	return true
}

// zombie returns a child that waits to be reaped, and leaves it so.
func zombie() (int, bool) {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, false
		}
		// si_pid follows three ints, aligned to the pointers of the union.
		pid := *(*int32)(unsafe.Add(unsafe.Pointer(&info), 16))
		return int(pid), pid != 0
	}
}
