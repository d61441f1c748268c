package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
)

type rec struct{ Name string }

func load(t *testing.T, b *Book) (map[string]string, error) {
	t.Helper()
	got := map[string]string{}
	err := b.Load(func(key string, body []byte) error {
		var r rec
		if err := json.Unmarshal(body, &r); err != nil {
			return err
		}
		got[key] = r.Name
		return nil
	})
	return got, err
}

func TestWriteLoadRemove(t *testing.T) {
	b, err := Open(filepath.Join(t.TempDir(), "book"))
	if err != nil {
		t.Fatal(err)
	}
	a, c := string(id.NewPod()), string(id.NewPod())
	for k, v := range map[string]string{a: "one", c: "two <>&"} {
		if err := b.Write(k, rec{v}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Write(a, rec{"one again"}); err != nil {
		t.Fatal(err)
	}
	got, err := load(t, b)
	if err != nil || got[a] != "one again" || got[c] != "two <>&" || len(got) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	for range 2 {
		if err := b.Remove(a); err != nil {
			t.Fatal(err)
		}
	}
	if got, _ := load(t, b); len(got) != 1 {
		t.Fatalf("%v", got)
	}
	if err := b.Write("../evil", rec{}); err == nil {
		t.Fatal("a key that is no id was written")
	}
}

func TestATornRecordCostsOnlyItself(t *testing.T) {
	b, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	good, bad := string(id.NewPod()), string(id.NewPod())
	for _, k := range []string{good, bad} {
		if err := b.Write(k, rec{"x"}); err != nil {
			t.Fatal(err)
		}
	}
	whole, err := os.ReadFile(b.path(bad))
	if err != nil {
		t.Fatal(err)
	}
	flipped := []byte(strings.Replace(string(whole), `"Name":"x"`, `"Name":"y"`, 1))
	for name, data := range map[string][]byte{"damaged": bytes.Replace(whole, []byte(`{"version"`), []byte(`{version"`), 1), "flipped": flipped, "newer": []byte(`{"version":99,"body":{}}`)} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(b.path(bad), data, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(b.dir, "."+bad+".json.tmp-1"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := load(t, b)
			if len(got) != 1 || got[good] != "x" || err == nil || !strings.Contains(err.Error(), bad) {
				t.Fatalf("%v, %v", got, err)
			}
			if _, err := os.Stat(b.path(bad) + ".bad"); err != nil {
				t.Fatal(err)
			}
			if _, err := load(t, b); err != nil {
				t.Fatalf("second load: %v", err)
			}
		})
	}
}

// TestALineCutShortCountsAsNotWritten: a crash in the middle of a Write leaves
// the record as it was, and the next Write is not harmed by what is left.
func TestALineCutShortCountsAsNotWritten(t *testing.T) {
	b, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	key := string(id.NewPod())
	var whole []byte
	for _, name := range []string{"first", "second"} {
		if err := b.Write(key, rec{name}); err != nil {
			t.Fatal(err)
		}
		before := whole
		if whole, err = os.ReadFile(b.path(key)); err != nil {
			t.Fatal(err)
		}
		if name == "first" {
			continue
		}
		for n := len(before); n < len(whole); n++ {
			if err := os.WriteFile(b.path(key), whole[:n], 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := load(t, b); err != nil || got[key] != "first" {
				t.Fatalf("cut after %d of %d bytes: %v, %v", n, len(whole), got, err)
			}
			if n%16 != 0 {
				continue
			}
			if err := b.Write(key, rec{"third"}); err != nil {
				t.Fatal(err)
			}
			if got, err := load(t, b); err != nil || got[key] != "third" {
				t.Fatalf("written after a cut at %d: %v, %v", n, got, err)
			}
		}
	}
	// A newest line that is whole and wrong is no reason to believe the one before it.
	if err := os.WriteFile(b.path(key), append(whole[:len(whole):len(whole)], "\n{\"version\":99,\"body\":{}}"...), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := load(t, b); err == nil || len(got) != 0 {
		t.Fatalf("a newer version: %v, %v", got, err)
	}
}

func TestALongFileIsReplaced(t *testing.T) {
	b, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	key := string(id.NewPod())
	for i := range 100 {
		if err := b.Write(key, rec{strings.Repeat("x", 5000+i)}); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(b.path(key)); err != nil || st.Size() > maxSize {
			t.Fatalf("%v, %v", st, err)
		}
		if got, err := load(t, b); err != nil || len(got[key]) != 5000+i {
			t.Fatalf("write %d: %d bytes, %v", i, len(got[key]), err)
		}
	}
	if err := b.Write(key, rec{strings.Repeat("y", 2*maxSize)}); err != nil {
		t.Fatal(err)
	}
	if got, err := load(t, b); err != nil || len(got[key]) != 2*maxSize {
		t.Fatalf("a record longer than the limit: %d bytes, %v", len(got[key]), err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"version":1,"sha256":"","body":{}}`))
	f.Add([]byte(`{`))
	key := string(id.NewPod())
	f.Fuzz(func(t *testing.T, data []byte) {
		b := &Book{dir: t.TempDir()}
		if err := os.WriteFile(b.path(key), data, 0o600); err != nil {
			t.Fatal(err)
		}
		_ = b.Load(func(string, []byte) error { return nil })
	})
}

// TestAFirstWriteCutShortNeverWas: a daemon killed before the first line of a
// record was whole has done nothing yet, and leaves nothing.
func TestAFirstWriteCutShortNeverWas(t *testing.T) {
	b, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	key := string(id.NewPod())
	line, err := encode("x")
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(line) - 1 {
		if err := os.WriteFile(b.path(key), line[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		err := b.Load(func(key string, body []byte) error {
			t.Errorf("cut after %d bytes: loaded %s", n, body)
			return nil
		})
		if err != nil {
			t.Fatalf("cut after %d bytes: %v", n, err)
		}
		if left, _ := os.ReadDir(b.dir); len(left) > 0 {
			t.Fatalf("cut after %d bytes: left %v", n, left)
		}
	}
}

// TestLookChangesNothing: it sees what Load sees, and what Load moved aside.
func TestLookChangesNothing(t *testing.T) {
	dir := t.TempDir()
	b, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	good, bad, aside, never := string(id.NewPod()), string(id.NewPod()), string(id.NewPod()), string(id.NewPod())
	if err := b.Write(good, rec{"x"}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{bad + ".json": "\n{version}", aside + ".json.bad": "?", never + ".json": `{"ver`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		seen := map[string]error{}
		if err := Look(dir, func(key string, _ []byte, err error) { seen[key] = err }); err != nil {
			t.Fatal(err)
		}
		if err, ok := seen[good]; !ok || err != nil {
			t.Errorf("the good record: %v, %v", ok, err)
		}
		if seen[bad] == nil || !errors.Is(seen[aside+".json.bad"], ErrAside) || len(seen) != 3 {
			t.Errorf("seen %v", seen)
		}
	}
	if err := Look(filepath.Join(dir, "missing"), nil); err != nil {
		t.Errorf("a missing folder: %v", err)
	}
}

// TestAWantOfDescriptorsIsNoDamage: from the folder on, and from the second record on.
func TestAWantOfDescriptorsIsNoDamage(t *testing.T) {
	dir := t.TempDir()
	b, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := b.Write(string(id.NewPod()), rec{"x"}); err != nil {
			t.Fatal(err)
		}
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	limit := func(n uint64) error { return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: was.Max}) }
	defer func() { _ = limit(was.Cur) }()
	for _, n := range []int{0, 1} {
		read := 0
		if n == 0 {
			_ = limit(0)
		}
		err := b.Load(func(string, []byte) error { read++; return limit(0) })
		_ = limit(was.Cur)
		if read != n || !errors.Is(err, ErrUnread) {
			t.Errorf("%d read: %v", read, err)
		}
	}
	read := 0
	if err := b.Load(func(string, []byte) error { read++; return nil }); err != nil || read != 3 {
		t.Errorf("%d read after it: %v", read, err)
	}
}
