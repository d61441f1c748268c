package crilog

import (
	"bytes"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/lane"
)

const timeFormat = "2006-01-02T15:04:05.000000000Z"

var streamNames = [...]string{"stdout", "stderr"}

// format makes records of one stream.
type format struct {
	header []byte // with room for the tag
	tag    int    // where the tag is in header
}

func newFormat(stream int) format {
	h := []byte(timeFormat + " " + streamNames[stream] + " F ")
	return format{header: h, tag: len(h) - 2}
}

func (f format) stamp(t time.Time) { t.AppendFormat(f.header[:0], timeFormat) }

func (f format) record(out []byte, tag byte, content []byte) []byte {
	f.header[f.tag] = tag
	out = append(out, f.header...)
	out = append(out, content...)
	return append(out, '\n')
}

// records appends the records that p holds in full to out, as long as one more
// is sure to fit in limit. It returns how much of p is in them. The rest, when the
// limit is not what ended it, is an unfinished line of at most MaxContent bytes.
func (f format) records(out, p []byte, limit int) ([]byte, int) {
	n := 0
	for len(p) > n && limit-len(out) >= maxRecord {
		// A newline right behind a full record still ends it.
		window := p[n:min(len(p), n+MaxContent+1)]
		i := bytes.IndexByte(window, '\n')
		switch {
		case i >= 0:
			out = f.record(out, 'F', window[:i])
			n += i + 1
		case len(window) > MaxContent:
			out = f.record(out, 'P', window[:MaxContent])
			n += MaxContent
		default:
			return out, n
		}
	}
	return out, n
}

// all makes records of all of p. For bytes that records, or End, took at once
// they are the same ones.
func (f format) all(p []byte) []byte {
	out, n := f.records(nil, p, math.MaxInt)
	if n < len(p) {
		out = f.record(out, 'P', p[n:])
	}
	return out
}

// Stream turns the raw bytes of one output stream into records. Its methods are
// for one goroutine.
type Stream struct {
	log   *Log
	pool  *lane.Pool
	owner lane.Owner
	lane  *lane.Lane // nil: nothing is unlogged
	via   lane.Via
	format
	last    time.Time
	resumed bool // the log has finished what a former process left, and told its last time
}

// Stream returns the log's stream of o, whose bytes are in lanes of pool. left is
// the lane that a killed process left with this stream's bytes; nil: none. Such
// a lane must be among those that the log was opened with by Adopt, and its stream
// begins with Write.
func (l *Log) Stream(pool *lane.Pool, o lane.Owner, left *lane.Lane) *Stream {
	return &Stream{log: l, pool: pool, owner: o, lane: left, format: newFormat(o.Stream)}
}

// stamp sets the time of the batch. It never goes back within the stream, also
// when the clock is set back: readers resume by time.
func (s *Stream) stamp() {
	if now := time.Now().UTC().Round(0); now.After(s.last) {
		s.last = now
	}
	s.format.stamp(s.last)
}

// Receive takes what fd has to give now, at most lane.Batch bytes, and returns it;
// it is valid until the next call. Nothing at all is the end of the source, or
// with EAGAIN that nothing is there at present. Write must follow what was received.
func (s *Stream) Receive(fd int) ([]byte, error) {
	if s.lane == nil {
		s.lane = s.pool.Take(s.owner)
	}
	n, err := s.lane.Receive(fd, &s.via)
	if err == unix.EAGAIN {
		s.idle()
		return nil, err
	}
	b := s.lane.Bytes()
	return b[len(b)-n:], err
}

// idle gives back what a stream that waits does not need.
func (s *Stream) idle() {
	if len(s.lane.Bytes()) > 0 {
		s.lane.Trim()
		return
	}
	s.pool.Put(s.lane)
	s.lane = nil
}

// Write logs what was received. A line that is not finished stays back until its
// newline comes, until it exceeds MaxContent, or until End.
func (s *Stream) Write() {
	if !s.resumed {
		s.resumed = true
		if t := s.log.resume(s.owner.Stream); t.After(s.last) {
			s.last = t
		}
	}
	if s.lane == nil || len(s.lane.Bytes()) == 0 {
		return
	}
	s.stamp()
	buf := batches.Get().(*[]byte)
	for {
		out, n := s.records((*buf)[:0], s.lane.Bytes(), batchSize)
		if n == 0 {
			break
		}
		s.log.write(s.lane, n, out, s.last)
	}
	batches.Put(buf)
}

// End logs a line that was never finished, tagged P.
func (s *Stream) End() {
	s.Write()
	if s.lane == nil {
		return
	}
	if b := s.lane.Bytes(); len(b) > 0 {
		s.stamp()
		s.log.write(s.lane, len(b), s.record(nil, 'P', b), s.last)
	}
	s.pool.Put(s.lane)
	s.lane = nil
}
