package testimage

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func executable(t *testing.T, name string, body []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, body, 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestExiterExitsZero(t *testing.T) {
	b, err := Exiter(runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(executable(t, "true", b)).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("exiter: %v %q", err, out)
	}
}

func TestPauserStaysUntilSignalled(t *testing.T) {
	b, err := Pauser(runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		c := exec.Command(executable(t, "pause", b))
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- c.Wait() }()
		select {
		case err := <-done:
			t.Fatalf("pauser ended by itself: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		c.Process.Signal(sig)
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("pauser after %v: %v", sig, err)
			}
		case <-time.After(5 * time.Second):
			c.Process.Kill()
			t.Fatalf("pauser ignores %v", sig)
		}
	}
}

func TestTinyNamesTheArchitectures(t *testing.T) {
	if _, err := Exiter("riscv64"); err == nil || !strings.Contains(err.Error(), "arm64") {
		t.Fatalf("Exiter(riscv64): %v", err)
	}
}

func TestProgramCommands(t *testing.T) {
	body, err := BuildProgram(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	prog := executable(t, "prog", body)
	for _, c := range []struct {
		args []string
		out  string
		code int
	}{
		{[]string{"true"}, "", 0},
		{[]string{"exit", "7"}, "", 7},
		{[]string{"echo", "a", "b"}, "a b\n", 0},
		{[]string{"print", "3", "4"}, "xxx\nxxx\nxxx\n", 0},
		{[]string{"print", "1", "1"}, "\n", 0},
		{[]string{"env", "WHAT"}, "this\n", 0},
		{[]string{"env", "NOTHING"}, "", 1},
		{[]string{"stat", "/dev/null"}, "/dev/null c0666 0:0 0 nlink=1 ", 0},
		{[]string{"nonsense"}, "", 2},
	} {
		cmd := exec.Command(prog, c.args...)
		cmd.Env = []string{"WHAT=this"}
		out, err := cmd.Output()
		var ee *exec.ExitError
		if err != nil && !errors.As(err, &ee) {
			t.Fatal(err)
		}
		if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.HasPrefix(string(out), c.out) {
			t.Errorf("%v: exit %d, output %q; want %d, %q", c.args, code, out, c.code, c.out)
		}
	}
	// Every link of the image must be a command of the program.
	out, err := exec.Command(prog, "commands").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if !strings.Contains("\n"+string(out), "\n"+l+"\n") {
			t.Errorf("/bin/%s is no command of the program", l)
		}
	}
}

func TestLayersAreValidInEveryCompression(t *testing.T) {
	for _, c := range []Compression{Gzip, Zstd, Uncompressed} {
		l, err := Layer(c, Entry{Name: "d/"}, Entry{Name: "d/f", Body: []byte("x"), UID: 3000000, Xattrs: map[string]string{"user.k": "v"}},
			Entry{Name: "d/h", Type: tar.TypeLink, Target: "d/f"}, Entry{Name: "d/null", Type: tar.TypeChar, Major: 1, Minor: 3}, Whiteout("d", "gone"), Opaque("o"))
		if err != nil {
			t.Fatal(err)
		}
		// validate.Layer knows gzip only; the others are checked by their diff ID.
		if c == Gzip {
			if err := validate.Layer(l); err != nil {
				t.Errorf("%s: %v", c, err)
			}
		}
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		if _, err := io.Copy(h, r); err != nil {
			t.Fatal(err)
		}
		if d, _ := l.DiffID(); d.Hex != hex.EncodeToString(h.Sum(nil)) {
			t.Errorf("%s: diff ID is not the digest of the tar", c)
		}
	}
	if _, err := Layer("lzma"); err == nil {
		t.Error("unknown compression is taken")
	}
}

func TestTreeHasItsFilesAndBytes(t *testing.T) {
	tree := Tree{Files: 103, Bytes: 200_000, Layers: 3, Compression: Zstd, Seed: 7}
	img, err := tree.Image("")
	if err != nil {
		t.Fatal(err)
	}
	again, err := tree.Image("")
	if err != nil {
		t.Fatal(err)
	}
	a, _ := img.Digest()
	if b, _ := again.Digest(); a != b {
		t.Errorf("same tree, digests %v and %v", a, b)
	}
	files, bytes := 0, int64(0)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				files, bytes = files+1, bytes+h.Size
			}
		}
	}
	if len(layers) != 3 || files != 103 || bytes != 200_000 {
		t.Errorf("%d layers, %d files, %d bytes", len(layers), files, bytes)
	}
	if _, err := (Tree{Files: 1, Layers: 2, Bytes: 10}).Image(""); err == nil {
		t.Error("fewer files than layers is taken")
	}
}

func TestRegistryServesWhatWasPushed(t *testing.T) {
	img, err := Pause("")
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	reg, err := Serve("127.0.0.1:0", func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/secret/") {
				refused++
				http.Error(w, "no", http.StatusForbidden)
				return
			}
			next.ServeHTTP(w, r)
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, repo := range []string{"pause:1", "secret/pause:1"} {
		if _, err := reg.Push(ctx, repo, img); err != nil {
			t.Fatal(err)
		}
	}
	if refused != 0 {
		t.Error("Push goes through the faults")
	}
	want, _ := img.Digest()
	pull := func(ref string) (v1.Image, error) {
		r, err := name.ParseReference(ref, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		return remote.Image(r, remote.WithContext(ctx))
	}
	got, err := pull(reg.Ref("pause:1"))
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := got.Digest(); d != want {
		t.Errorf("digest %v, want %v", d, want)
	}
	if err := validate.Image(got); err != nil {
		t.Error(err)
	}
	if _, err := pull(reg.Ref("secret/pause:1")); err == nil || refused == 0 {
		t.Errorf("wrap was not asked: %v", err)
	}
	idx, err := Index(img)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := reg.PushIndex(ctx, "list:1", idx); err != nil {
		t.Fatal(err)
	}
	if got, err := pull(reg.Ref("list:1")); err != nil {
		t.Error(err)
	} else if d, _ := got.Digest(); d != want {
		t.Errorf("digest through the index %v, want %v", d, want)
	}
}
