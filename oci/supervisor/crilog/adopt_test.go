package crilog

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/lane"
)

var owners = [...]lane.Owner{{Container: "c", Stream: 0}, {Container: "c", Stream: 1}}

// abandoned is a lane as a killed process leaves it that had received in and,
// for the first n bytes of it, armed w.
func abandoned(t testing.TB, o lane.Owner, in string, n int, w lane.Write) *lane.Lane {
	t.Helper()
	l := lane.NewPool(func(l *lane.Lane) { t.Cleanup(l.Close) }, nil, nil).Take(o)
	s := newSource(t, &Stream{})
	if _, err := unix.Write(s.w, []byte(in)); err != nil {
		t.Fatal(err)
	}
	var via lane.Via
	if got, err := l.Receive(s.r, &via); got != len(in) || err != nil {
		t.Fatal(got, err)
	}
	if n > 0 {
		l.Arm(n, w)
	}
	return l
}

// at is the file as it is: what a write now would note.
func at(t testing.TB, path string, now time.Time) lane.Write {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return lane.Write{Dev: st.Dev, Ino: st.Ino, Size: st.Size, Time: now}
}

func appendTo(t testing.TB, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	if err == nil {
		_, err = f.WriteString(text)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// resumed adopts path and lets the stream of b, and then one more line, run out.
func resumed(t testing.TB, path string, b *lane.Lane, stream int, more string) *Log {
	t.Helper()
	var lanes []*lane.Lane
	if b != nil {
		lanes = append(lanes, b)
	}
	l := Adopt(path, func(err error) { t.Error(err) }, lanes...)
	p := lane.NewPool(func(l *lane.Lane) { t.Cleanup(l.Close) }, nil, nil)
	if b != nil {
		p.Add(b)
	}
	s := newSource(t, l.Stream(p, owners[stream], b))
	s.Write()
	s.put([]byte(more))
	s.End()
	return l
}

const stamp1 = "2026-01-02T03:04:05.000000006Z"

var time1 = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

func text(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestAdoptCompletesAWrite, of which more and more has arrived.
func TestAdoptCompletesAWrite(t *testing.T) {
	before := stamp1 + " stderr F before\n"
	whole := stamp1 + " stdout F one\n" + stamp1 + " stdout F two\n"
	for arrived := range len(whole) + 1 {
		path := filepath.Join(t.TempDir(), "0.log")
		appendTo(t, path, before)
		b := abandoned(t, owners[0], "one\ntwo\nthr", 8, at(t, path, time1))
		appendTo(t, path, whole[:arrived])
		resumed(t, path, b, 0, "ee\n")
		got := text(t, path)
		rest, ok := strings.CutPrefix(got, before+whole)
		if r := strings.SplitN(rest, " ", 2); !ok || len(r) != 2 || r[1] != "stdout F three\n" {
			t.Fatalf("%d bytes had arrived: %q", arrived, got)
		}
	}
}

// TestAdoptFirst: the write of one stream is completed before the other stream
// writes anything.
func TestAdoptFirst(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	appendTo(t, path, "")
	whole := stamp1 + " stdout F one\n"
	b := abandoned(t, owners[0], "one\n", 4, at(t, path, time1))
	appendTo(t, path, whole[:20])
	l := Adopt(path, nil, b)
	newSource(t, l.Stream(lane.NewPool(nil, nil, nil), owners[1], nil)).put([]byte("other\n"))
	if got := records(t, path); fmt.Sprint(got) != "[{stdout F one} {stderr F other}]" {
		t.Errorf("%v", got)
	}
	if len(b.Bytes()) != 0 {
		t.Errorf("left %q", b.Bytes())
	}
}

func TestAdoptAfterRotation(t *testing.T) {
	whole := stamp1 + " stdout F one\n"
	for name, c := range map[string]struct {
		rotate   func(path, old string) error
		old, now string // contents
	}{
		"renamed":    {os.Rename, whole, "[{stdout F two}]"},
		"gone":       {func(path, _ string) error { return os.Remove(path) }, "", "[{stdout F one} {stdout F two}]"},
		"truncated":  {func(path, _ string) error { return os.Truncate(path, 0) }, "", "[{stdout F one} {stdout F two}]"},
		"compressed": {func(path, old string) error { return os.Rename(path, filepath.Join(filepath.Dir(old), "..", "far")) }, "", "[{stdout F one} {stdout F two}]"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "d", "0.log")
			if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			before := stamp1 + " stderr F " + strings.Repeat("before", 20) + "\n"
			appendTo(t, path, before)
			b := abandoned(t, owners[0], "one\n", 4, at(t, path, time1))
			appendTo(t, path, whole[:20])
			if err := c.rotate(path, path+".old"); err != nil {
				t.Fatal(err)
			}
			resumed(t, path, b, 0, "two\n")
			if c.old != "" {
				if got := text(t, path+".old"); got != before+c.old {
					t.Errorf("old file %q", got)
				}
			}
			if got := records(t, path); fmt.Sprint(got) != c.now {
				t.Errorf("new file %v, want %v", got, c.now)
			}
		})
	}
}

// TestAdoptEndsABrokenRecord that a full disk left.
func TestAdoptEndsABrokenRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	appendTo(t, path, stamp1+" stdout F brok")
	resumed(t, path, nil, 0, "new\n")
	if got := records(t, path); fmt.Sprint(got) != "[{stdout F brok} {stdout F new}]" {
		t.Errorf("%v", got)
	}
}

// TestAdoptKeepsTime: the clock was set back while the supervisor was dead.
func TestAdoptKeepsTime(t *testing.T) {
	future := time.Now().UTC().Add(time.Hour).Truncate(time.Second)
	for name, c := range map[string]struct {
		log  string
		lane time.Time
	}{
		"of the log":  {strings.Repeat(future.Format(timeFormat)+" stdout F "+strings.Repeat("x", 9000)+"\n", 9), time.Time{}},
		"of the lane": {"", future},
		"of neither":  {future.Format(timeFormat) + " stderr F x\n", time.Time{}},
	} {
		path := filepath.Join(t.TempDir(), "0.log")
		appendTo(t, path, c.log)
		var b *lane.Lane
		if !c.lane.IsZero() {
			b = abandoned(t, owners[0], "one\ntwo\n", 4, at(t, path, c.lane))
			if err := os.Rename(path, path+".old"); err != nil { // with the time that it had
				t.Fatal(err)
			}
		}
		resumed(t, path, b, 0, "new\n")
		got := text(t, path)
		last := got[strings.LastIndexByte(got[:len(got)-1], '\n')+1:][:len(timeFormat)]
		if want := future.Format(timeFormat); (last < want) != (name == "of neither") {
			t.Errorf("time %s: record of %s", name, last)
		}
		records(t, path)
	}
}

// TestAdoptWithoutAFile: the log drops what comes, until it is reopened.
func TestAdoptWithoutAFile(t *testing.T) {
	dir := t.TempDir()
	appendTo(t, filepath.Join(dir, "file"), "")
	var failure error
	l := Adopt(filepath.Join(dir, "file", "0.log"), func(err error) { failure = err })
	s := newSource(t, l.Stream(lane.NewPool(nil, nil, nil), owners[0], nil))
	s.put([]byte("lost\n"))
	if failure == nil || l.Dropped() == 0 {
		t.Errorf("%v, %d bytes dropped", failure, l.Dropped())
	}
	path := filepath.Join(dir, "1.log")
	if err := l.Reopen(path); err != nil {
		t.Fatal(err)
	}
	s.put([]byte("kept\n"))
	if got := records(t, path); fmt.Sprint(got) != "[{stdout F kept}]" {
		t.Errorf("%v", got)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestKilledWithAFullDisk: what the disk cannot take is lost, once, and nothing
// else; when there is room again the log goes on.
func TestKilledWithAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("berth-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("needs root: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	var in []byte
	for i := range 1000 {
		in = fmt.Appendf(in, "%04d %s\n", i, strings.Repeat("x", 30))
	}
	const after = "9998 after\n9999 after\n"
	for k := 1; ; k++ {
		kp := &keeper{t: t, path: filepath.Join(dir, "0.log"), lanes: map[int][]*os.File{}}
		ballast := filepath.Join(dir, "ballast")
		appendTo(t, ballast, strings.Repeat("x", 32<<10))
		kp.sources = given(t, in)
		killed := kp.start(k).wait()
		if killed && kp.start(0).wait() {
			t.Fatal("killed by whom?")
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		kp.sources = given(t, []byte(after))
		if kp.start(0).wait() {
			t.Fatal("killed by whom?")
		}
		last, tail, torn := "", "", 0
		for line := range strings.Lines(text(t, kp.path)) {
			f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
			if len(f) < 4 || f[3] != "9998 after" && f[3] != "9999 after" && len(f[3]) != 35 {
				torn++
				continue
			}
			if f[3] <= last {
				t.Errorf("killed at step %d: %q after %q", k, f[3], last)
			}
			last = f[3]
			if strings.HasSuffix(last, "after") {
				tail += last + "\n"
			}
		}
		if tail != after || torn > 1 {
			t.Errorf("killed at step %d: at the end %q, %d broken records", k, tail, torn)
		}
		kp.close()
		if err := os.Remove(kp.path); err != nil {
			t.Fatal(err)
		}
		if !killed {
			t.Logf("%d steps", k-1)
			return
		}
	}
}

// given are sources that hold these bytes and nothing.
func given(t testing.TB, in []byte) (out [2]*os.File) {
	t.Helper()
	for i, content := range [][]byte{in, nil} {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Write(p[1], content); n != len(content) {
			t.Fatal(n, err)
		}
		_ = unix.Close(p[1])
		out[i] = os.NewFile(uintptr(p[0]), "source")
	}
	return out
}

// FuzzDamagedLane: a lane with any header costs the bytes in it and no others.
func FuzzDamagedLane(f *testing.F) {
	l := abandoned(f, owners[0], "one\ntwo\nthr", 4, lane.Write{Ino: 1, Size: 2, Time: time1})
	head := make([]byte, 160)
	files, err := l.Files()
	if err == nil {
		_, err = files[0].ReadAt(head, 0)
	}
	if err != nil {
		f.Fatal(err)
	}
	f.Add(head, int64(4096+11), []byte("one\ntwo\nthr"))
	f.Add(head, int64(4096+4), bytes.Repeat([]byte{'\n'}, 60_000))
	f.Fuzz(func(t *testing.T, head []byte, position int64, in []byte) {
		b := abandoned(t, owners[0], "x"+string(in[:min(len(in), lane.Batch-1)]), 0, lane.Write{})
		files, err := b.Files()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := files[0].WriteAt(head[:min(len(head), 4096)], 0); err != nil {
			t.Fatal(err)
		}
		_, _ = files[0].Seek(position, unix.SEEK_SET)
		left, err := lane.Open(files)
		if err != nil {
			return
		}
		defer left.Close()
		path := filepath.Join(t.TempDir(), "0.log")
		appendTo(t, path, stamp1+" stderr F before\n")
		_, stream, _ := left.Owner()
		l := resumed(t, path, left, stream, "after\n")
		p := lane.NewPool(func(l *lane.Lane) { t.Cleanup(l.Close) }, nil, nil)
		newSource(t, l.Stream(p, owners[1-stream], nil)).put([]byte("other\n"))
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		got := text(t, path)
		if !strings.HasPrefix(got, stamp1+" stderr F before\n") || !strings.Contains(got, "after\n") || !strings.HasSuffix(got, " F other\n") {
			t.Errorf("%q", got)
		}
	})
}
