package lane

import (
	"maps"
	"os"
	"slices"
	"sync"
)

// warm is how many lanes there are when none is in use.
const warm = 4

// Pool hands lanes to streams. It makes them on demand and keeps some that come
// back.
type Pool struct {
	announce func(*Lane)
	retire   func(id int)
	failed   func(error)

	mu      sync.Mutex
	all     map[int]*Lane // nil: being made
	idle    []*Lane       // a stack: the last one is in the processor's caches
	failing bool          // the last lane could not be made
}

// NewPool returns an empty pool. announce is called for each lane that is made,
// before anything is in it: it returns when whoever is to keep the lane has its
// files. retire is called when nothing will ever be in the lane again; its number
// may be another lane's afterwards. failed hears why a lane could not be made, once
// until one can. They are called outside of any lock, and may be nil.
func NewPool(announce func(*Lane), retire func(id int), failed func(error)) *Pool {
	return &Pool{announce: announce, retire: retire, failed: failed, all: map[int]*Lane{}}
}

// Take returns an empty lane for o. It waits for no other stream and always
// succeeds: where there is no descriptor or memory for one, the lane is an
// ordinary buffer, whose content is lost when the process is killed.
func (p *Pool) Take(o Owner) *Lane {
	l := p.next()
	if l == nil {
		l = p.make()
	}
	if l == nil {
		l = inMemory()
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

// Warm makes the lanes that the pool keeps when none is in use.
func (p *Pool) Warm() {
	for p.count() < warm {
		l := p.make()
		if l == nil {
			return
		}
		p.Put(l)
	}
}

func (p *Pool) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all)
}

// make returns nil when that is not possible.
func (p *Pool) make() *Lane {
	p.mu.Lock()
	id := p.unusedLocked()
	p.all[id] = nil
	p.mu.Unlock()
	l, err := newLane(id)
	p.mu.Lock()
	again := p.failing
	p.failing = err != nil
	if err == nil {
		p.all[id] = l
	} else {
		delete(p.all, id)
	}
	p.mu.Unlock()
	switch {
	case err == nil && p.announce != nil:
		p.announce(l)
	case err != nil && p.failed != nil && !again:
		p.failed(err)
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
	p.idle = append(p.idle, l)
	var spare *Lane
	if len(p.idle) > warm {
		// The last numbers go: in the end the lanes are those of the beginning.
		last := 0
		for i, l := range p.idle {
			if l.ID() > p.idle[last].ID() {
				last = i
			}
		}
		spare = p.idle[last]
		p.idle = slices.Delete(p.idle, last, last+1)
	}
	p.mu.Unlock()
	if spare == nil {
		return
	}
	id := spare.ID()
	if p.retire != nil {
		p.retire(id) // before the number is free again
	}
	p.mu.Lock()
	delete(p.all, id)
	spare.Close()
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

// Kept is what whoever keeps a lane has of it.
type Kept struct {
	ID    int
	Files []*os.File // as Lane.Files returns them
}

// All returns the lanes that there are, for somebody who comes late to keep them.
// The caller closes the files. A lane may be among them whose announcement, or
// retirement, is still to come.
func (p *Pool) All() ([]Kept, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []Kept
	for _, id := range slices.Sorted(maps.Keys(p.all)) {
		l := p.all[id]
		if l == nil {
			continue
		}
		files, err := l.Files()
		if err != nil {
			for _, k := range out {
				closeAll(k.Files)
			}
			return nil, err
		}
		out = append(out, Kept{id, files})
	}
	return out, nil
}
