// Package ranked has locks that know their place in a package's lock order.
//
// A package writes its order down as ranks, outer first, and gives each lock one.
// In its tests, after Check, a goroutine that takes a lock of the same rank as one
// that it holds, or of a lower one, panics, whether or not another goroutine was
// there to deadlock with; so does one that waits for something slow (Waits) while
// it holds a lock that is not to be held then. In production a lock costs one
// atomic load more than a sync.Mutex.
package ranked

import (
	"bytes"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
)

// Rank is a place in the order. A higher one is taken later.
type Rank int

// At is a type with a rank, so that the zero value of a lock has one.
type At interface{ Rank() Rank }

// Mutex is a sync.Mutex with a rank. Its zero value is ready for use.
type Mutex[R At] struct{ mu sync.Mutex }

// Lock locks m.
func (m *Mutex[R]) Lock() {
	var r R
	Enter(r.Rank())
	m.mu.Lock()
}

// Unlock unlocks m, on the goroutine that locked it.
func (m *Mutex[R]) Unlock() {
	m.mu.Unlock()
	var r R
	Leave(r.Rank())
}

var (
	checking atomic.Bool
	mu       sync.Mutex
	held     map[uint64][]Rank // by goroutine, guarded by mu
)

// Check turns the checking on, for the tests of a package. Call it before any
// lock is taken; it stays on.
func Check() {
	mu.Lock()
	defer mu.Unlock()
	if held == nil {
		held = map[uint64][]Rank{}
	}
	checking.Store(true)
}

// Enter says that the calling goroutine is about to take a lock of rank r; for
// locks that are no Mutex.
func Enter(r Rank) {
	if !checking.Load() {
		return
	}
	g := goroutine()
	mu.Lock()
	defer mu.Unlock()
	for _, h := range held[g] {
		if h >= r {
			panic(fmt.Sprintf("lock order: rank %d is taken while rank %d is held", r, h))
		}
	}
	held[g] = append(held[g], r)
}

// Leave says that the calling goroutine has let go of a lock of rank r.
func Leave(r Rank) {
	if !checking.Load() {
		return
	}
	g := goroutine()
	mu.Lock()
	defer mu.Unlock()
	all := held[g]
	for i := len(all) - 1; i >= 0; i-- {
		if all[i] == r {
			all = append(all[:i], all[i+1:]...)
			break
		}
	}
	if held[g] = all; len(all) == 0 {
		delete(held, g)
	}
}

// Waits says that the calling goroutine is about to do something that may take
// long, which no lock of rank r or a later one may be held for.
func Waits(r Rank, what string) {
	if !checking.Load() {
		return
	}
	g := goroutine()
	mu.Lock()
	defer mu.Unlock()
	for _, h := range held[g] {
		if h >= r {
			panic(fmt.Sprintf("lock order: rank %d is held while %s is waited for", h, what))
		}
	}
}

// goroutine is the calling goroutine's number, as stack traces have it. The
// runtime tells it in no other way; that is slow, and good enough for tests.
func goroutine() uint64 {
	var buf [64]byte
	b, _, _ := bytes.Cut(bytes.TrimPrefix(buf[:runtime.Stack(buf[:], false)], []byte("goroutine ")), []byte(" "))
	n, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil {
		panic(fmt.Sprintf("stack trace without a goroutine: %q", b))
	}
	return n
}
