package supervisor

import (
	"context"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// attachLimit is how many bytes an attacher may be behind before it is cut off.
const attachLimit = 1 << 20

// attachers duplicates a container's output. Its mutex is held only to copy
// bytes in memory: a slow attacher costs nobody anything but itself.
type attachers struct {
	mu    sync.Mutex
	all   map[*attacher]struct{}
	ended bool
}

// add takes over the files and serves them until the output ends, the reader
// goes away, it falls behind, or ctx ends. It reports false after the end of the output.
func (a *attachers) add(ctx context.Context, start func(func()), stdout, stderr *os.File) bool {
	at := &attacher{files: [2]*os.File{stdout, stderr}, wake: make(chan struct{}, 1), gone: make(chan struct{})}
	a.mu.Lock()
	if a.ended {
		a.mu.Unlock()
		at.close()
		return false
	}
	if a.all == nil {
		a.all = map[*attacher]struct{}{}
	}
	a.all[at] = struct{}{}
	a.mu.Unlock()
	for _, f := range at.files {
		if f != nil && isStream(f) {
			// A pipe without a reader raises EPOLLERR: a silent container must not
			// collect the descriptors of sessions that are over.
			start(func() { _ = waitReadable(f, unix.POLLERR); at.cut() })
		}
	}
	stop := context.AfterFunc(ctx, at.cut)
	start(func() {
		at.run()
		stop()
		a.mu.Lock()
		delete(a.all, at)
		a.mu.Unlock()
	})
	return true
}

func (a *attachers) deliver(stream int, p []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for at := range a.all {
		at.push(stream, p)
	}
}

// end closes the attachers after they have got everything.
func (a *attachers) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = true
	for at := range a.all {
		at.end()
	}
}

type chunk struct {
	stream int
	data   []byte
}

type attacher struct {
	files [2]*os.File // nil: not wanted
	wake  chan struct{}
	gone  chan struct{} // closed by cut
	once  sync.Once

	mu    sync.Mutex
	queue []chunk
	size  int
	ended bool
}

func (a *attacher) signal() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *attacher) push(stream int, p []byte) {
	if a.files[stream] == nil {
		return
	}
	a.mu.Lock()
	over := a.size+len(p) > attachLimit
	if !over {
		a.queue = append(a.queue, chunk{stream, append([]byte(nil), p...)})
		a.size += len(p)
	}
	a.mu.Unlock()
	if over {
		a.cut()
		return
	}
	a.signal()
}

func (a *attacher) end() {
	a.mu.Lock()
	a.ended = true
	a.mu.Unlock()
	a.signal()
}

// cut ends the attacher now. Closing the files wakes a blocked write.
func (a *attacher) cut() {
	a.once.Do(func() { close(a.gone) })
	a.close()
}

func (a *attacher) close() {
	for _, f := range a.files {
		if f != nil {
			_ = f.Close() // a second close is harmless: os.File remembers
		}
	}
}

func (a *attacher) run() {
	defer a.close()
	for {
		a.mu.Lock()
		q, ended := a.queue, a.ended
		a.queue = nil
		a.mu.Unlock()
		for _, c := range q {
			if _, err := a.files[c.stream].Write(c.data); err != nil {
				a.cut()
				return
			}
			a.mu.Lock()
			a.size -= len(c.data)
			a.mu.Unlock()
		}
		if len(q) > 0 {
			continue
		}
		if ended {
			return
		}
		select {
		case <-a.wake:
		case <-a.gone:
			return
		}
	}
}

// attachFile prepares a received descriptor for an attacher: nil for the null
// device, else a File that can be closed while a write waits.
func attachFile(f *os.File) (*os.File, error) {
	var st unix.Stat_t
	if err := control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3) {
		return nil, nil
	}
	return dupPollable(f)
}
