package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
)

// scripted is a runtime that is a shell script.
func scripted(t *testing.T, script string, timeout time.Duration) *Runtime {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "runtime")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	r, err := New(Config{Handler: "scripted", Command: oci.Command{Path: path, Args: []string{"--own"}, Timeout: timeout}, Dir: filepath.Join(dir, "external")})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRunTellsWhatTheRuntimeSaid(t *testing.T) {
	// $7 is the log: --own --root DIR --log FILE --log-format json VERB
	for name, x := range map[string]struct {
		script, want string
		kind         error
	}{
		"log":         {`echo '{"level":"warning","msg":"no"}' >$5; echo '{"level":"error","msg":"the reason","time":"x"}' >>$5; echo noise >&2; exit 1`, "the reason", nil},
		"stderr":      {`echo "the reason" >&2; exit 1`, "the reason", nil},
		"nothing":     {`exit 3`, "exit status 3", nil},
		"no program":  {`echo '{"level":"error","msg":"exec: \"x\": executable file not found in $PATH"}' >$5; exit 1`, "not found in", errdefs.ErrNotFound},
		"crun's":      {`echo '{"msg":"executable file ` + "`x`" + ` not found in $PATH: No such file or directory","level":"error"}' >$5; exit 1`, "not found in", errdefs.ErrNotFound},
		"not for us":  {`echo '{"level":"error","msg":"exec: \"x\": permission denied"}' >$5; exit 1`, "denied", errdefs.ErrPermissionDenied},
		"a flood":     {`i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; i=$((i+1)); done >&2; exit 1`, "0123456789", nil},
		"environment": {`env | grep -v -e ^PWD= -e ^PATH= -e ^_= -e ^SHLVL= -e ^OLDPWD= >&2; echo end >&2; exit 1`, ": end", nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := scripted(t, x.script, 0)
			_, err := r.run(context.Background(), nil, r.dir, call{verb: "state"})
			if err == nil || !strings.Contains(err.Error(), x.want) || x.kind != nil && !errors.Is(err, x.kind) {
				t.Fatalf("error %v, want %q", err, x.want)
			}
			if text := err.Error(); !strings.HasPrefix(text, `handler "scripted": `+r.cfg.Command.Path+" state: ") || len(text) > maxMessage+500 {
				t.Errorf("%d bytes: %.300s", len(text), text)
			}
			if logs, _ := filepath.Glob(filepath.Join(r.dir, "log-*")); len(logs) > 0 {
				t.Errorf("left: %v", logs)
			}
		})
	}
}

// A command that hangs is killed with what it started.
func TestHungCommandIsKilled(t *testing.T) {
	r := scripted(t, "sleep 1000 & echo $! >$5.child; wait", 300*time.Millisecond)
	_, err := r.run(context.Background(), nil, r.dir, call{verb: "kill"})
	if !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "kill: did not end within 300ms") {
		t.Errorf("error %v", err)
	}
	files, _ := filepath.Glob(filepath.Join(r.dir, "*.child"))
	if len(files) != 1 {
		t.Fatalf("it did not start its child: %v", files)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("its child lives")
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	r.cfg.Command.Timeout = time.Minute
	if _, err := r.run(ctx, nil, r.dir, call{verb: "kill"}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// What a later process finds of containers whose maker is gone.
func TestRemoveLeftovers(t *testing.T) {
	r := scripted(t, `echo "$*" >>$(dirname $0)/calls`, 0)
	external := filepath.Dir(r.dir)
	cg := fmt.Sprintf("/berth-external-test-%d", os.Getpid())
	var all []*Container
	for i := range 3 {
		c, err := r.Create(context.Background(), oci.CreateRequest{
			ID:     id.NewContainer(),
			Rootfs: oci.Rootfs{Lowers: []string{t.TempDir()}},
			Spec:   &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{CgroupsPath: cg}},
		})
		if err != nil {
			t.Fatal(err)
		}
		k := c.(*Container)
		all = append(all, k)
		if i == 1 { // as if it had crashed while making it
			if err := os.Remove(filepath.Join(k.dir, labelFile)); err != nil {
				t.Fatal(err)
			}
		}
		if err := k.mounts.Close(); err != nil { // as the kernel does at a crash
			t.Fatal(err)
		}
	}
	g, _, err := r.cgroups.Create(cg, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Delete(); err != nil {
			t.Error(err)
		}
	})
	if err := RemoveLeftovers(context.Background(), external, func(id.Container) bool { return false }, slog.Default()); err != nil {
		t.Error(err)
	}
	left, err := os.ReadDir(r.bundles())
	if err != nil || len(left) > 0 {
		t.Errorf("bundles: %v, %v", left, err)
	}
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + cg); len(dirs) > 0 {
		t.Errorf("cgroups: %v", dirs)
	}
	calls, err := os.ReadFile(filepath.Join(filepath.Dir(r.cfg.Command.Path), "calls"))
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range all {
		if got := strings.Contains(string(calls), "delete --force "+string(c.id)); got != (i != 1) {
			t.Errorf("container %d: delete was called: %v\n%s", i, got, calls)
		}
	}
}

// A folder of the host that is mounted in a bundle is out of reach of its removal.
func TestRemovalNeverDescendsIntoMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	volume, bundle := t.TempDir(), t.TempDir()
	precious := filepath.Join(volume, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(bundle, mountsDir, "0")
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(volume, at, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	err := removeBundle(bundle)
	if uerr := unix.Unmount(at, 0); uerr != nil {
		t.Error(uerr)
	}
	if _, serr := os.Stat(precious); serr != nil || err == nil {
		t.Errorf("removal: %v; the file: %v", err, serr)
	}
	if err := removeBundle(bundle); err != nil {
		t.Errorf("without the mount: %v", err)
	}
	if _, err := os.Stat(bundle); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("bundle: %v", err)
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, kind := range map[string]error{
		"runc": errdefs.ErrInvalidArgument, "./runc": errdefs.ErrInvalidArgument, "": errdefs.ErrInvalidArgument,
		plain: errdefs.ErrFailedPrecondition, dir: errdefs.ErrFailedPrecondition, dir + "/none": errdefs.ErrFailedPrecondition,
	} {
		if err := Check(oci.Command{Path: path}); !errors.Is(err, kind) || !strings.Contains(err.Error(), "path") {
			t.Errorf("%q: %v, want kind %v", path, err, kind)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b"} {
		if _, err := New(Config{Handler: name, Command: oci.Command{Path: "/bin/sh"}, Dir: dir}); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("handler %q: %v", name, err)
		}
	}
}

func TestProbe(t *testing.T) {
	said := func(options ...string) string {
		b, err := json.Marshal(map[string]any{"ociVersionMin": "1.0.0", "mountOptions": options})
		if err != nil {
			t.Fatal(err)
		}
		return "echo '" + string(b) + "'"
	}
	for name, x := range map[string]struct {
		script string
		want   bool
		err    bool
	}{
		"rro":             {said("ro", "rro"), true, false},
		"no rro":          {said("ro"), false, false},
		"no such command": {"echo unknown command features >&2; exit 1", false, false},
		"nonsense":        {"echo yes", false, true},
	} {
		got, err := Probe(context.Background(), "x", scripted(t, x.script, 0).cfg.Command)
		if got.RecursiveReadonly != x.want || (err != nil) != x.err {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}
