package ranked

import (
	"strings"
	"sync"
	"testing"
)

type outer struct{}

func (outer) Rank() Rank { return 1 }

type inner struct{}

func (inner) Rank() Rank { return 2 }

// refusal is what f panics with.
func refusal(f func()) (text string) {
	defer func() {
		if p := recover(); p != nil {
			text = p.(string)
		}
	}()
	f()
	return ""
}

func TestOrder(t *testing.T) {
	var a, other Mutex[outer]
	var b Mutex[inner]
	n := 0
	b.Lock() // off: no order
	a.Lock()
	n++
	a.Unlock()
	b.Unlock()
	Check()
	for range 2 { // nothing is left of the first round
		a.Lock()
		b.Lock()
		if s := refusal(func() { Waits(2, "a disk") }); !strings.Contains(s, "a disk") {
			t.Errorf("a wait with a lock held: %q", s)
		}
		b.Unlock()
		if s := refusal(func() { Waits(2, "a disk") }); s != "" {
			t.Errorf("a wait with an outer lock held: %q", s)
		}
		if s := refusal(other.Lock); !strings.Contains(s, "rank 1 is taken while rank 1") {
			t.Errorf("two of one rank: %q", s)
		}
		a.Unlock()
		b.Lock()
		if s := refusal(a.Lock); !strings.Contains(s, "rank 1 is taken while rank 2") {
			t.Errorf("the wrong order: %q", s)
		}
		var wg sync.WaitGroup
		wg.Go(func() { // another goroutine holds nothing
			a.Lock()
			n++
			a.Unlock()
		})
		wg.Wait()
		b.Unlock()
	}
	if len(held) != 0 || n != 3 {
		t.Errorf("still held: %v; %d times inside", held, n)
	}
}
