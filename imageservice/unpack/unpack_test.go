package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

type ent struct {
	tar.Header
	data string
}

func file(name, data string) ent {
	return ent{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}
func mkdir(name string) ent {
	return ent{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}
func symlink(name, to string) ent {
	return ent{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, ""}
}
func hardlink(name, to string) ent {
	return ent{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}, ""}
}

func build(t testing.TB, es ...ent) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range es {
		e.Size = int64(len(e.data))
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(1e9, 0)
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// describe lists a tree: one line per object with kind, mode, and content.
func describe(t testing.TB, root string) []string {
	var out []string
	err := filepath.Walk(root, func(p string, st os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		if rel == "." {
			return nil
		}
		line := rel
		switch m := st.Mode(); {
		case m.IsDir():
			line += "/"
			buf := make([]byte, 8)
			if n, err := unix.Lgetxattr(p, "trusted.overlay.opaque", buf); err == nil {
				line += " opaque=" + string(buf[:n])
			}
		case m&os.ModeSymlink != 0:
			to, _ := os.Readlink(p)
			line += " -> " + to
		case m&os.ModeCharDevice != 0:
			var s unix.Stat_t
			if err := unix.Lstat(p, &s); err != nil {
				return err
			}
			line += fmt.Sprintf(" c%d:%d", unix.Major(s.Rdev), unix.Minor(s.Rdev))
		case m&os.ModeNamedPipe != 0:
			line += " fifo"
		case m.IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += " " + string(b)
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func needRoot(t testing.TB) {
	if os.Getuid() != 0 {
		t.Skip("needs root: device nodes, owners and trusted.* attributes")
	}
}

func TestApply(t *testing.T) {
	needRoot(t)
	dev := ent{tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, ""}
	fifo := ent{tar.Header{Typeflag: tar.TypeFifo, Name: "p", Mode: 0o600}, ""}
	for _, tt := range []struct {
		name string
		tar  []ent
		want []string
	}{
		{"plain", []ent{mkdir("./"), mkdir("a/"), file("a/f", "x"), symlink("l", "a/f"), dev, fifo},
			[]string{"a/", "a/f x", "l -> a/f", "null c1:3", "p fifo"}},
		{"parents not listed", []ent{file("a/b/c", "x")}, []string{"a/", "a/b/", "a/b/c x"}},
		{"absolute and dotted", []ent{file("/a", "1"), file("./b", "2"), file("x/../c", "3"), mkdir("."), mkdir("/")}, []string{"a 1", "b 2", "c 3"}},
		{"whiteouts", []ent{file(".wh.gone", ""), mkdir("d"), file("d/.wh..wh..opq", ""), file("d/new", "n"), file(".wh..wh.plnk", "")},
			[]string{"d/ opaque=y", "d/new n", "gone c0:0"}},
		{"whiteout before and after a directory of the same name",
			[]ent{file(".wh.a", ""), mkdir("a"), file("a/f", "x"), mkdir("b"), file(".wh.b", ""), file("f", "1"), file(".wh.f", ""), file(".wh.g", ""), file("g", "2")},
			[]string{"a/ opaque=y", "a/f x", "b/ opaque=y", "f 1", "g 2"}},
		{"later entries replace", []ent{file("f", "1"), file("f", "2"), symlink("l", "f"), file("l", "3"), mkdir("d"), file("d/x", "x"), file("d", "4"), file("e", "5"), mkdir("e"), file("e/y", "y")},
			[]string{"d 4", "e/", "e/y y", "f 2", "l 3"}},
		{"directory again", []ent{mkdir("d"), file("d/x", "x"), mkdir("d")}, []string{"d/", "d/x x"}},
		{"hard links", []ent{mkdir("d"), file("d/f", "x"), hardlink("g", "d/f"), hardlink("h", "/d/f"), hardlink("d/f", "d/f"), symlink("s", "d/f"), hardlink("t", "s")},
			[]string{"d/", "d/f x", "g x", "h x", "s -> d/f", "t -> d/f"}},
		{"link among the parents stays inside", []ent{mkdir("usr"), symlink("lib", "usr/lib"), mkdir("usr/lib"), file("lib/f", "x"), symlink("abs", "/usr"), file("abs/g/h", "y"), symlink("up", "../../.."), file("up/i", "z")},
			[]string{"abs -> /usr", "i z", "lib -> usr/lib", "up -> ../../..", "usr/", "usr/g/", "usr/g/h y", "usr/lib/", "usr/lib/f x"}},
		{"directory swapped for a link", []ent{mkdir("a"), file("a/1", "1"), symlink("a", "/"), file("a/x", "x")}, []string{"a -> /", "x x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			if _, err := Apply(t.Context(), root, bytes.NewReader(build(t, tt.tar...)), Limits{}); err != nil {
				t.Fatal(err)
			}
			if got := describe(t, root); !slices.Equal(got, tt.want) {
				t.Errorf("got\n %s\nwant\n %s", strings.Join(got, "\n "), strings.Join(tt.want, "\n "))
			}
		})
	}
}

// TestApplyHostile runs each layer beside a canary that must not change.
func TestApplyHostile(t *testing.T) {
	needRoot(t)
	outside := t.TempDir()
	canary := filepath.Join(outside, "canary")
	if err := os.WriteFile(canary, []byte("sings"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(canary, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	mode := func(e ent, m int64) ent { e.Mode = m; return e }
	long := strings.Repeat("x/", 2100) + "f"
	for _, tt := range []struct {
		name string
		tar  []ent
		fail bool
	}{
		{"up", []ent{file("../x", "evil")}, true},
		{"up inside", []ent{file("a/../../x", "evil")}, true},
		{"root as a link", []ent{symlink("./", "/")}, true},
		{"root as a file", []ent{file(".", "evil")}, true},
		{"link to the canary's directory", []ent{symlink("d", outside), file("d/canary", "evil")}, true},
		{"dangling link", []ent{symlink("d", "/nowhere/at/all"), file("d/f", "evil")}, true},
		{"link loop", []ent{symlink("a", "b"), symlink("b", "a"), file("a/f", "evil")}, true},
		{"file over a link", []ent{symlink("l", canary), mode(file("l", "evil"), 0o777)}, false},
		{"mode through hard link to link", []ent{symlink("l", canary), hardlink("h", "l"), mode(file("h", "evil"), 0o777)}, false},
		{"directory over a link", []ent{symlink("l", outside), mode(mkdir("l"), 0o777)}, false},
		{"hard link to the canary", []ent{hardlink("h", canary)}, true},
		{"directory replaced through a link", []ent{mkdir("r"), mkdir("r/d"), symlink("l", "r"), file("l/d", "2")}, true},
		{"hard link up", []ent{hardlink("h", "../../../../etc/passwd")}, true},
		{"hard link through a link", []ent{symlink("d", outside), hardlink("h", "d/canary")}, true},
		{"hard link to nothing", []ent{hardlink("h", "lower/file")}, true},
		{"hard link to the root", []ent{hardlink("h", ".")}, true},
		{"whiteout of dots", []ent{file(".wh...", "")}, true},
		{"whiteout of a dot", []ent{file(".wh..", "")}, true},
		{"whiteout of nothing", []ent{file(".wh.", "")}, true},
		{"whiteout through a link", []ent{symlink("d", outside), file("d/.wh.canary", "")}, true},
		{"long path", []ent{file(long, "x")}, true},
		{"uid that chown ignores", []ent{{tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1<<32 - 1, Format: tar.FormatPAX}, ""}}, true},
		{"uid that wraps", []ent{{tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1 << 32, Format: tar.FormatPAX}, ""}}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			_, err := Apply(t.Context(), root, bytes.NewReader(build(t, tt.tar...)), Limits{})
			if (err != nil) != tt.fail {
				t.Errorf("error %v", err)
			}
			st, serr := os.Lstat(canary)
			b, rerr := os.ReadFile(canary)
			es, _ := os.ReadDir(outside)
			if serr != nil || rerr != nil || string(b) != "sings" || st.Mode() != 0o640 || !st.ModTime().Equal(time.Unix(1, 0)) || len(es) != 1 {
				t.Fatalf("the canary changed: %v %q %v %v", st, b, es, serr)
			}
			var s unix.Stat_t
			if unix.Lstat(canary, &s) != nil || s.Nlink != 1 {
				t.Fatal("the canary has another name")
			}
		})
	}
}

func TestMetadata(t *testing.T) {
	needRoot(t)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	when := time.Unix(123456789, 987654321)
	h := tar.Header{
		Typeflag: tar.TypeReg, Name: "f", Mode: 0o4755, Uid: 3_000_000_000, Gid: 70_000, ModTime: when, Format: tar.FormatPAX,
		PAXRecords: map[string]string{
			"SCHILY.xattr.user.a": "b", "SCHILY.xattr.security.capability": capability,
			"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.security.selinux": "x",
		},
	}
	d := h
	d.Typeflag, d.Name, d.Mode = tar.TypeDir, "d", 0o1750
	d.PAXRecords = map[string]string{"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.overlay.opaque": "y"}
	l := h
	l.Typeflag, l.Name, l.Linkname, l.PAXRecords = tar.TypeSymlink, "l", "/etc/passwd", nil
	root := t.TempDir()
	usage, err := Apply(t.Context(), root, bytes.NewReader(build(t, ent{d, ""}, ent{h, "data"}, ent{l, ""}, file("d/in", "x"))), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if usage.Inodes != 5 || usage.Bytes != 4*4096 {
		t.Errorf("usage %+v", usage)
	}
	for name, mode := range map[string]uint32{"f": unix.S_IFREG | 0o4755, "d": unix.S_IFDIR | 0o1750, "l": unix.S_IFLNK | 0o777} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode != mode || st.Uid != 3_000_000_000 || st.Gid != 70_000 || st.Mtim.Nano() != when.UnixNano() {
			t.Errorf("%s: mode %o owner %d:%d time %v", name, st.Mode, st.Uid, st.Gid, time.Unix(0, st.Mtim.Nano()))
		}
	}
	for path, want := range map[string]string{
		"f user.a": "b", "f security.capability": capability, "d user.a": "b",
		"f trusted.overlay.redirect": "", "f user.overlay.opaque": "", "d trusted.overlay.opaque": "",
	} {
		f, attr, _ := strings.Cut(path, " ")
		buf := make([]byte, 64)
		n, err := unix.Lgetxattr(filepath.Join(root, f), attr, buf)
		if err != nil {
			n = 0
		}
		if string(buf[:n]) != want {
			t.Errorf("%s = %q, want %q (%v)", path, buf[:n], want, err)
		}
	}
}

func TestLimits(t *testing.T) {
	var many []ent
	for i := range 20 {
		many = append(many, file(fmt.Sprint(i), "x"))
	}
	bomb := io.MultiReader(bytes.NewReader(build(t, file("f", "x"))), io.LimitReader(zeroReader{}, 10<<30))
	for _, tt := range []struct {
		name string
		r    io.Reader
		l    Limits
	}{
		{"entries", bytes.NewReader(build(t, many...)), Limits{Entries: 10}},
		{"bytes", bytes.NewReader(build(t, file("f", strings.Repeat("x", 10_000)))), Limits{Bytes: 5000}},
		{"zeros after the end", bomb, Limits{}},
		{"truncated", bytes.NewReader(build(t, file("f", strings.Repeat("x", 10_000)))[:3000]), Limits{}},
		{"no tar", strings.NewReader(strings.Repeat("nonsense", 500)), Limits{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Apply(t.Context(), t.TempDir(), tt.r, tt.l); err == nil {
				t.Error("no error")
			}
		})
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestManyDirs needs more directories than descriptors are kept open, used in
// an order that closes and opens them again.
func TestManyDirs(t *testing.T) {
	var es []ent
	const n = 3 * maxOpenDirs
	for i := range n {
		es = append(es, mkdir(fmt.Sprintf("d%d", i)), mkdir(fmt.Sprintf("d%d/s", i)))
	}
	for i := range n {
		es = append(es, file(fmt.Sprintf("d%d/s/f", (i*7)%n), "x"))
	}
	root := t.TempDir()
	before := openFDs(t)
	if _, err := Apply(t.Context(), root, bytes.NewReader(build(t, es...)), Limits{}); err != nil {
		t.Fatal(err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("descriptors: %d before, %d after", before, after)
	}
	files, _ := filepath.Glob(filepath.Join(root, "d*/s/f"))
	if len(files) != n {
		t.Errorf("%d files, want %d", len(files), n)
	}
	for _, d := range []string{"d0", "d500/s"} {
		if st, err := os.Stat(filepath.Join(root, d)); err != nil || !st.ModTime().Equal(time.Unix(1e9, 0)) {
			t.Errorf("%s: %v %v", d, st.ModTime(), err)
		}
	}
}

func openFDs(t testing.TB) int {
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}

// TestCorruptLayersLeakNothing applies broken streams many times.
func TestCorruptLayersLeakNothing(t *testing.T) {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write(build(t, mkdir("a"), file("a/f", strings.Repeat("data", 10000))))
	_ = w.Close()
	goroutines, fds := runtime.NumGoroutine(), openFDs(t)
	for i := range 200 {
		b := bytes.Clone(z.Bytes())
		b = b[:len(b)*(i+1)/201]
		raw := NewStage(bytes.NewReader(b), sha256.New())
		if r, err := Decompress(raw); err == nil {
			st := NewStage(r, sha256.New())
			if _, err := Apply(t.Context(), t.TempDir(), st, Limits{}); err == nil && i > 2 {
				t.Errorf("%d bytes: no error", len(b))
			}
			st.Close()
			_ = r.Close()
		}
		raw.Close()
	}
	if g := runtime.NumGoroutine(); g > goroutines+2 {
		t.Errorf("goroutines: %d before, %d after", goroutines, g)
	}
	if f := openFDs(t); f > fds {
		t.Errorf("descriptors: %d before, %d after", fds, f)
	}
}

func TestSparse(t *testing.T) {
	root := t.TempDir()
	data := "head" + strings.Repeat("\x00", 4<<20) + "tail"
	if _, err := Apply(t.Context(), root, bytes.NewReader(build(t, file("f", data))), Limits{}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "f"))
	if err != nil || string(b) != data {
		t.Errorf("content differs: %d bytes, %v", len(b), err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "f"), &st); err != nil || st.Blocks*512 > 2<<20 {
		t.Errorf("%d bytes on disk: no holes", st.Blocks*512)
	}
}

func TestDecompress(t *testing.T) {
	want := strings.Repeat("some text ", 100_000)
	pack := map[string]func(io.Writer) io.WriteCloser{
		"gzip": func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
		"zstd": func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z },
	}
	for kind, f := range pack {
		var b bytes.Buffer
		for range 2 { // streams may be concatenated
			w := f(&b)
			_, _ = io.WriteString(w, want)
			_ = w.Close()
		}
		r, err := Decompress(bytes.NewReader(b.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || string(got) != want+want {
			t.Errorf("%s: %d bytes, %v", kind, len(got), err)
		}
		_ = r.Close()
		if r, err = Decompress(bytes.NewReader(b.Bytes()[:b.Len()-20])); err == nil {
			_, err = io.ReadAll(r)
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) && err == nil {
			t.Errorf("%s: truncated: %v", kind, err)
		}
	}
}

func FuzzApply(f *testing.F) {
	f.Add(build(f, mkdir("a"), file("a/b", "x"), symlink("l", "a"), file("l/c", "y"), hardlink("h", "a/b")))
	f.Add(build(f, file(".wh.a", ""), mkdir("a"), file("a/.wh..wh..opq", ""), symlink("a", "/"), file("a/x", "z")))
	f.Fuzz(func(t *testing.T, b []byte) {
		outer := t.TempDir()
		root := filepath.Join(outer, "root")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		_, _ = Apply(t.Context(), root, bytes.NewReader(b), Limits{Bytes: 8 << 20, Entries: 1000})
		if es, err := os.ReadDir(outer); err != nil || len(es) != 1 {
			t.Fatalf("outside of the root: %v %v", es, err)
		}
	})
}
