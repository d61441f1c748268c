package crilog

import (
	"bytes"
	"time"
)

const timeFormat = "2006-01-02T15:04:05.000000000Z"

// Stream turns the raw bytes of one output stream into records. Its methods are
// for one goroutine.
type Stream struct {
	log    *Log
	header []byte // of the present batch, with room for the tag
	tag    int    // where the tag is in header
	last   time.Time
	held   []byte // an unfinished line, at most MaxContent bytes
}

// Stream returns a stream of the log: name is "stdout" or "stderr".
func (l *Log) Stream(name string) *Stream {
	h := make([]byte, 0, len(timeFormat)+len(name)+4)
	h = append(h, timeFormat...)
	h = append(h, ' ')
	h = append(h, name...)
	h = append(h, " F "...)
	return &Stream{log: l, header: h, tag: len(h) - 2}
}

// stamp sets the time of the batch. It never goes back within the stream, also
// when the clock is set back: readers resume by time.
func (s *Stream) stamp() {
	if now := time.Now().UTC().Round(0); now.After(s.last) {
		s.last = now
	}
	s.last.AppendFormat(s.header[:0], timeFormat)
}

func (s *Stream) record(out []byte, tag byte, content []byte) []byte {
	s.header[s.tag] = tag
	out = append(out, s.header...)
	out = append(out, content...)
	return append(out, '\n')
}

// Write logs p. A line that p does not finish is held back until its newline
// comes, until it exceeds MaxContent, or until End.
func (s *Stream) Write(p []byte) {
	if len(p) == 0 {
		return
	}
	s.stamp()
	buf := batches.Get().(*[]byte)
	out := (*buf)[:0]
	for len(p) > 0 {
		if cap(out)-len(out) < maxRecord {
			s.log.write(out)
			out = out[:0]
		}
		room := MaxContent - len(s.held)
		// A newline right behind a full record still ends it.
		window := p[:min(len(p), room+1)]
		i := bytes.IndexByte(window, '\n')
		switch {
		case i >= 0 && len(s.held) == 0:
			out = s.record(out, 'F', p[:i])
			p = p[i+1:]
		case i >= 0:
			s.held = append(s.held, p[:i]...)
			out = s.record(out, 'F', s.held)
			s.held = s.held[:0]
			p = p[i+1:]
		case len(p) > room && len(s.held) == 0:
			out = s.record(out, 'P', p[:room])
			p = p[room:]
		case len(p) > room:
			s.held = append(s.held, p[:room]...)
			out = s.record(out, 'P', s.held)
			s.held = s.held[:0]
			p = p[room:]
		default:
			s.held = append(s.held, p...)
			p = nil
		}
	}
	s.log.write(out)
	*buf = out[:0]
	batches.Put(buf)
	if len(s.held) == 0 {
		s.held = nil // an idle stream keeps no memory
	}
}

// End logs a line that was never finished, tagged P.
func (s *Stream) End() {
	if len(s.held) == 0 {
		return
	}
	s.stamp()
	s.log.write(s.record(nil, 'P', s.held))
	s.held = nil
}
