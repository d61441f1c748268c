package lane

import (
	"maps"
	"slices"
	"sync"
)

// warm is how many idle lanes keep all their memory.
const warm = 4

// Pool hands lanes to streams. It makes them on demand and keeps those that come
// back, so that whoever holds their descriptors hears of each once.
type Pool struct {
	announce func(*Lane)
	failed   func(error)

	mu   sync.Mutex
	all  map[int]*Lane // nil: being made
	idle []*Lane       // a stack: the last one is in the processor's caches
}

// NewPool returns an empty pool. announce is called for each lane that is made,
// before anything is in it, and outside of any lock: it returns when whoever is to
// keep the lane has it. failed hears why a lane could not be made. Both may be nil.
func NewPool(announce func(*Lane), failed func(error)) *Pool {
	return &Pool{announce: announce, failed: failed, all: map[int]*Lane{}}
}

// Take returns an empty lane for o. It waits for no other stream and always
// succeeds: where there is no descriptor or memory for one, the lane is an
// ordinary buffer, whose content is lost when the process is killed.
func (p *Pool) Take(o Owner) *Lane {
	l := p.next()
	if l == nil {
		l = p.make()
	}
	l.own(o)
	return l
}

func (p *Pool) next() *Lane {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle) - 1
	if n < 0 {
		return nil
	}
	l := p.idle[n]
	p.idle[n] = nil
	p.idle = p.idle[:n]
	return l
}

func (p *Pool) make() *Lane {
	p.mu.Lock()
	id := p.unusedLocked()
	p.all[id] = nil
	p.mu.Unlock()
	l, err := newLane(id)
	p.mu.Lock()
	if err == nil {
		p.all[id] = l
	} else {
		delete(p.all, id)
	}
	p.mu.Unlock()
	switch {
	case err == nil && p.announce != nil:
		p.announce(l)
	case err != nil:
		if p.failed != nil {
			p.failed(err)
		}
		return inMemory()
	}
	return l
}

// unusedLocked is the least number that no lane has.
func (p *Pool) unusedLocked() int {
	id := 0
	for _, used := p.all[id]; used; _, used = p.all[id] {
		id++
	}
	return id
}

// Put takes a lane back. What is still in it is forgotten.
func (p *Pool) Put(l *Lane) {
	if l.files == nil {
		return
	}
	if l.busy() {
		l.discard()
	}
	p.mu.Lock()
	spare := len(p.idle) >= warm
	p.mu.Unlock()
	if spare {
		l.Trim()
	}
	p.mu.Lock()
	p.idle = append(p.idle, l)
	p.mu.Unlock()
}

// Add makes an opened lane one of the pool's, as if it was taken: it is to be Put
// when nobody wants what is in it any more. It keeps its ID where no other lane
// has the same, else it is announced under another one.
func (p *Pool) Add(l *Lane) {
	p.mu.Lock()
	id := int(l.h.id)
	_, clash := p.all[id]
	if clash {
		id = p.unusedLocked()
		l.h.id = uint32(id)
	}
	p.all[id] = l
	p.mu.Unlock()
	if clash && p.announce != nil {
		p.announce(l)
	}
}

// All returns the lanes that there are, for somebody who comes late to keep them.
// One that is being announced may be among them.
func (p *Pool) All() []*Lane {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]*Lane, 0, len(p.all))
	for _, id := range slices.Sorted(maps.Keys(p.all)) {
		if l := p.all[id]; l != nil {
			out = append(out, l)
		}
	}
	return out
}
