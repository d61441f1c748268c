package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berth-runtime/berth/internal/dirlock"
	"github.com/berth-runtime/berth/internal/leftover"
)

// runFsck runs the command as a user does.
func runFsck(t *testing.T, args ...string) (out, errOut string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	c := command()
	c.SetArgs(append([]string{"fsck"}, args...))
	c.SetOut(&o)
	c.SetErr(&e)
	err := c.ExecuteContext(t.Context())
	var exit exitCode
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return o.String(), e.String(), int(exit)
}

// TestFsck on a node with nothing but one folder too many.
func TestFsck(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skipped: needs root: fsck looks at what only root sees")
	}
	root, state := t.TempDir(), t.TempDir()
	config := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(config, []byte("root = \""+root+"\"\nstate = \"/nonsense\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(state, "pods", strings.Repeat("a", 64))
	if err := os.MkdirAll(filepath.Join(dir, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	out, _, code := runFsck(t, "--config", config, "--state", state)
	if code != 1 || !strings.Contains(out, "left     pod-files  "+dir) && !strings.Contains(out, "left  pod-files  "+dir) || !strings.Contains(out, "fsck --repair removes it") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	before, _ := filepath.Glob(state + "/*")
	if len(before) != 1 {
		t.Errorf("looking made %v", before)
	}
	out, _, _ = runFsck(t, "--config", config, "--state", state, "--repair")
	if _, err := os.Stat(dir); !os.IsNotExist(err) || !strings.Contains(out, "removed  pod-files  "+dir) {
		t.Errorf("repair: %v\n%s", err, out)
	}

	lock, err := dirlock.Take(state)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{}, {"--repair"}} {
		if _, text, code := runFsck(t, append([]string{"--root", root, "--state", state}, args...)...); code != 3 || !strings.Contains(text, "berthd runs on "+state) {
			t.Errorf("%v beside a daemon: exit code %d, %q", args, code, text)
		}
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--root", root + "/missing", "--state", state}, {"--config", root + "/missing"}} {
		if _, text, code := runFsck(t, args...); code != 2 || !strings.Contains(text, "missing") {
			t.Errorf("%v: exit code %d, %q", args, code, text)
		}
	}
}

// TestFsckOfAnothersState: the root folder is not that of the records, so all that
// the supervisor holds would be on none.
func TestFsckOfAnothersState(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skipped: needs root: fsck looks at what only root sees")
	}
	root, state, theirs := t.TempDir(), t.TempDir(), t.TempDir()
	dir := filepath.Join(state, "pods", strings.Repeat("a", 64))
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(state, "root"), []byte(theirs), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{}, {"--repair"}} {
		out, _, code := runFsck(t, append([]string{"--root", root, "--state", state}, args...)...)
		if code != 2 || !strings.Contains(out, theirs) {
			t.Errorf("%v: exit code %d\n%s", args, code, out)
		}
	}
	if _, err := os.Stat(dir); err != nil {
		t.Error(err)
	}
}

func TestFsckReport(t *testing.T) {
	var out bytes.Buffer
	now := time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)
	e := &env{out: &out, now: func() time.Time { return now }, output: "table"}
	r := fsckReport{Unseen: "supervisor: no answer", Findings: []fsckFinding{
		{Finding: leftover.Finding{Kind: leftover.Link, Name: "berth0a", Detail: "of nobody"}, Removed: true},
		{Finding: leftover.Finding{Kind: leftover.Layer, Name: "/x", Detail: "of nobody", Since: now.Add(-3 * time.Minute)}, Error: "busy\nstill"},
		{Finding: leftover.Finding{Kind: leftover.Record, Name: "/y.bad", Detail: "torn", Remedy: "look into it"}},
	}}
	if err := e.printReport(r, 2, true); err != nil {
		t.Fatal(err)
	}
	want := `removed  link    berth0a  of nobody
failed   layer   /x       of nobody, 3m old; busy, still
left     record  /y.bad   torn; look into it
3 found, 1 removed, 2 left; could not look everywhere: supervisor: no answer
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}
