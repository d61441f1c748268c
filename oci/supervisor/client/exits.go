package client

import (
	"sync"

	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// exitQueue is a channel without a limit: the reader of the connection must
// never wait for whoever takes the exits. It holds at most one record for each
// container that ended.
type exitQueue struct {
	out  chan wire.Exit
	stop chan struct{}
	wake chan struct{}

	mu    sync.Mutex
	queue []wire.Exit
}

func newExitQueue() *exitQueue {
	return &exitQueue{out: make(chan wire.Exit), stop: make(chan struct{}), wake: make(chan struct{}, 1)}
}

func (q *exitQueue) push(e wire.Exit) {
	q.mu.Lock()
	q.queue = append(q.queue, e)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *exitQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-q.stop:
	default:
		close(q.stop)
	}
}

func (q *exitQueue) run() {
	defer close(q.out)
	for {
		q.mu.Lock()
		batch := q.queue
		q.queue = nil
		q.mu.Unlock()
		for _, e := range batch {
			select {
			case q.out <- e:
			case <-q.stop:
				return
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-q.wake:
		case <-q.stop:
			return
		}
	}
}
