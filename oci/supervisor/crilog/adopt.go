package crilog

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/lane"
)

// tailSize is how much of the end of a log is read for the last time of each
// stream: some of the largest records.
const tailSize = 4 * maxRecord

// adopted is a log that a killed process has left.
type adopted struct {
	path   string
	lanes  []*lane.Lane
	failed func(error)
}

// Adopt is Open for the log of a container whose supervisor was killed. lanes are
// those that it left with bytes of the container's streams. It touches no file:
// the first use of the log opens it and completes the write that was under way,
// before any stream of the log writes anything. When that fails the error goes to
// failed, which must not use the log, and the log drops what comes until a Reopen.
func Adopt(path string, failed func(error), lanes ...*lane.Lane) *Log {
	return &Log{left: &adopted{path: path, lanes: lanes, failed: failed}}
}

// resume finishes what Adopt left and returns the stream's last time in the log;
// zero: unknown, or none.
func (l *Log) resume(stream int) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finishLocked()
	return l.last[stream]
}

// finishLocked opens an adopted log.
func (l *Log) finishLocked() {
	a := l.left
	if a == nil {
		return
	}
	l.left = nil
	f, err := open(a.path, unix.O_RDWR)
	if err != nil && a.failed != nil {
		a.failed(err)
	}
	l.file = f
	for _, b := range a.lanes {
		l.complete(b, a.path)
	}
	if f == nil {
		return
	}
	l.last, l.torn = tail(f)
	for _, b := range a.lanes {
		if _, stream, _ := b.Owner(); b.Last().After(l.last[stream]) {
			l.last[stream] = b.Last()
		}
	}
}

// complete ends the write that the lane's former process began. Only one of the
// streams that share a file can have been at it.
func (l *Log) complete(b *lane.Lane, path string) {
	p, w := b.Armed()
	if p == nil {
		return
	}
	f, size := l.file, int64(0)
	var st unix.Stat_t
	if f == nil || unix.Fstat(int(f.Fd()), &st) != nil || st.Dev != w.Dev || st.Ino != w.Ino {
		// The file was renamed, for a Reopen that did not come any more.
		if f = find(filepath.Dir(path), w); f == nil {
			b.Disarm()
			return
		}
		defer f.Close()
		if unix.Fstat(int(f.Fd()), &st) != nil {
			b.Disarm()
			return
		}
	}
	size = st.Size
	_, stream, _ := b.Owner()
	form := newFormat(stream)
	form.stamp(w.Time)
	out := form.all(p)
	// A file that is shorter than before was truncated by somebody: nothing of
	// the write is in it.
	arrived := min(max(size-w.Size, 0), int64(len(out)))
	if rest := out[arrived:]; len(rest) > 0 {
		n, err := writeFile(f, rest)
		if err != nil { // what has come of it stays torn; tail sees that
			l.dropped.Add(uint64(len(rest) - n))
		}
	}
	b.Commit()
}

// find opens the file of a write by its inode.
func find(dir string, w lane.Write) *os.File {
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(256)
		for _, e := range entries {
			if !e.Type().IsRegular() {
				continue
			}
			var st unix.Stat_t
			if unix.Fstatat(int(d.Fd()), e.Name(), &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Ino != w.Ino || st.Dev != w.Dev {
				continue
			}
			f, err := openRegular(int(d.Fd()), e.Name(), unix.O_WRONLY)
			if err != nil {
				continue
			}
			if unix.Fstat(int(f.Fd()), &st) == nil && st.Ino == w.Ino && st.Dev == w.Dev {
				return f
			}
			_ = f.Close()
		}
		if err != nil || len(entries) == 0 {
			return nil
		}
	}
}

// tail reads the last time of each stream from the end of a log, and whether it
// ends inside a record.
func tail(f *os.File) (last [len(streamNames)]time.Time, torn bool) {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return last, false
	}
	at := max(st.Size-int64(tailSize), 0)
	b := make([]byte, st.Size-at)
	n, err := f.ReadAt(b, at)
	if err != nil && err != io.EOF {
		return last, false
	}
	b = b[:n]
	torn = n > 0 && b[n-1] != '\n'
	if at > 0 { // the first line is a part of one
		b = b[bytes.IndexByte(b, '\n')+1:]
	}
	for line := range bytes.Lines(b) {
		for i, name := range streamNames {
			if rest, ok := bytes.CutPrefix(line[min(len(timeFormat), len(line)):], []byte(" "+name+" ")); ok && len(rest) > 0 {
				if t, err := time.Parse(timeFormat, string(line[:len(timeFormat)])); err == nil {
					last[i] = t
				}
			}
		}
	}
	return last, torn
}
