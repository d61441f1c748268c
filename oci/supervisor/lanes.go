package supervisor

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/lane"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// announceTime bounds the wait for a daemon that is to hold a new lane: a stream
// waits for it, and it happens once in a lane's life.
const announceTime = time.Second

// leftLanes are the lanes of a dead supervisor with bytes of streams that nobody
// has gone on with yet.
type leftLanes struct {
	mu   sync.Mutex
	busy map[id.Container][]*lane.Lane
}

func (l *leftLanes) add(of id.Container, x *lane.Lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy == nil {
		l.busy = map[id.Container][]*lane.Lane{}
	}
	l.busy[of] = append(l.busy[of], x)
}

// take returns the lanes of a container.
func (l *leftLanes) take(of id.Container) []*lane.Lane {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.busy[of]
	delete(l.busy, of)
	return out
}

// drop returns all there are.
func (l *leftLanes) drop() (out []*lane.Lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, x := range l.busy {
		out = append(out, x...)
	}
	l.busy = nil
	return out
}

// announce gives a new lane to the daemon, which may not be there: it asks when it
// comes.
func (s *Server) announce(l *lane.Lane) {
	body, err := json.Marshal(wire.LanesReply{IDs: []int{l.ID()}})
	if err != nil {
		return
	}
	limit := time.After(announceTime)
	for _, c := range s.keepers() {
		files, err := l.Files()
		if err != nil {
			s.log.Warn("lane is not held by the daemon", "error", err)
			return
		}
		b, err := wire.Encode(wire.Frame{Op: wire.OpLane, Body: body}, len(files))
		if err != nil {
			wire.CloseFiles(files)
			return
		}
		sent := make(chan struct{})
		c.post(message{bytes: b, files: files, sent: sent})
		select {
		case <-sent:
		case <-limit:
			return
		}
	}
}

// retire tells the daemon that it need not hold a lane any longer. One that is not
// there finds out when it asks again.
func (s *Server) retire(id int) {
	body, err := json.Marshal(wire.LanesReply{IDs: []int{id}})
	if err != nil {
		return
	}
	b, err := wire.Encode(wire.Frame{Op: wire.OpLaneGone, Body: body}, 0)
	if err != nil {
		return
	}
	for _, c := range s.keepers() {
		c.post(message{bytes: b})
	}
}

// keepers are the connections of who holds lanes.
func (s *Server) keepers() (out []*conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if c.events.Load() && c.version.Load() >= wire.VersionTakeover {
			out = append(out, c)
		}
	}
	return out
}

func dupFiles(files []*os.File) (out []*os.File, err error) {
	for _, f := range files {
		d, err := dupFile(f)
		if err != nil {
			wire.CloseFiles(out)
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

// listLanes serves OpLanes.
func (s *Server) listLanes(r wire.Lanes) (reply wire.LanesReply, files []*os.File, err error) {
	all, err := s.lanes.All()
	if err != nil {
		return reply, nil, err
	}
	reply.Total = len(all)
	if r.From < 0 || r.From > len(all) {
		closeLanes(all)
		return reply, nil, fmt.Errorf("lanes from %d: there are %d: %w", r.From, len(all), errdefs.ErrInvalidArgument)
	}
	closeLanes(all[:r.From])
	n := min(len(all)-r.From, wire.MaxFDs/wire.LaneFDs)
	for _, l := range all[r.From:][:n] {
		reply.IDs, files = append(reply.IDs, l.ID), append(files, l.Files...)
	}
	closeLanes(all[r.From+n:])
	return reply, files, nil
}

func closeLanes(all []lane.Kept) {
	for _, l := range all {
		wire.CloseFiles(l.Files)
	}
}

// putLanes serves OpPutLanes; the files are the caller's. A damaged lane costs
// what is in it.
func (s *Server) putLanes(files []*os.File) error {
	if len(files) == 0 || len(files)%wire.LaneFDs != 0 {
		return fmt.Errorf("%d descriptors, want %d for each lane: %w", len(files), wire.LaneFDs, errdefs.ErrInvalidArgument)
	}
	for ; len(files) > 0; files = files[wire.LaneFDs:] {
		own, err := dupFiles(files[:wire.LaneFDs])
		if err != nil {
			return err
		}
		l, err := lane.Open(own)
		if err != nil {
			s.log.Error("output of a container may be lost: its lane cannot be taken over", "error", err)
			continue
		}
		s.lanes.Add(l)
		if of, _, busy := l.Owner(); busy {
			s.left.add(id.Container(of), l)
		} else {
			s.lanes.Put(l)
		}
	}
	return nil
}
