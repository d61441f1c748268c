package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berth-runtime/berth/internal/pullapi"
)

var id1 = strings.Repeat("1", 64)
var id2 = strings.Repeat("2", 64)

func render(t *testing.T, rows [][]string) string {
	t.Helper()
	var b bytes.Buffer
	if err := table(&b, rows); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestPsTable(t *testing.T) {
	now := time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)
	got := render(t, psTable([]podRow{
		{ID: id1, Namespace: "default", Name: "web-0", State: "ready", CreatedAt: now.Add(-3 * time.Minute), IPs: []string{"10.88.0.2", "fd00:88::2"},
			Containers: []containerRow{{ID: id2, Name: "nginx", State: "running", CreatedAt: now.Add(-90 * time.Second), Image: "docker.io/library/nginx:1.29"}}},
		{ID: id2, Namespace: "kube-system", Name: "dns", State: "not ready", CreatedAt: now.Add(-50 * time.Hour)},
	}, now))
	want := `POD / CONTAINER  ID             STATE      AGE  IP / IMAGE
default/web-0    1111111111111  ready      3m   10.88.0.2 fd00:88::2
  nginx          2222222222222  running    90s  docker.io/library/nginx:1.29
kube-system/dns  2222222222222  not ready  2d
`
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestImagesTable(t *testing.T) {
	got := render(t, imagesTable([]imageRow{
		{ID: "sha256:" + id1, Tags: []string{"docker.io/library/a:1", "docker.io/library/a:latest"}, Size: 5 << 20},
		{ID: "sha256:" + id2, Digests: []string{"docker.io/library/b@sha256:x"}, Size: 900},
		{ID: "sha256:" + id2, Size: 1 << 40},
	}))
	want := `IMAGE                         ID             SIZE
docker.io/library/a:1         1111111111111  5.0 MiB
docker.io/library/a:latest    1111111111111  5.0 MiB
docker.io/library/b@sha256:x  2222222222222  900 B
-                             2222222222222  1.0 TiB
`
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestFind(t *testing.T) {
	all := []object{
		{kind: "container", id: "abc1" + strings.Repeat("0", 60), label: "default/web/nginx", names: []string{"nginx", "web/nginx"}},
		{kind: "container", id: "abc2" + strings.Repeat("0", 60), label: "default/api/nginx", names: []string{"nginx", "api/nginx"}},
		{kind: "container", id: "def1" + strings.Repeat("0", 60), names: []string{"job"}, dead: true},
		{kind: "container", id: "def2" + strings.Repeat("0", 60), names: []string{"job"}},
		{kind: "image", id: "sha256:9999" + strings.Repeat("0", 60), names: []string{"docker.io/library/busybox:latest", "busybox"}},
		{kind: "pod", id: "9aaa" + strings.Repeat("0", 60), names: []string{"abc"}},
	}
	for ref, want := range map[string]string{
		"web/nginx": "abc1", "abc2": "abc2", "busybox": "9999", "9999": "9999", "sha256:9999": "9999",
		"job":                            "def2", // the one that lives
		"abc":                            "9aaa", // a name fits before a prefix
		"abc1" + strings.Repeat("0", 60): "abc1",
	} {
		o, err := find(ref, all)
		if err != nil || !strings.HasPrefix(strings.TrimPrefix(o.id, "sha256:"), want) {
			t.Errorf("%q: %v, %v, want %s", ref, o.id, err, want)
		}
	}
	if _, err := find("nginx", all); err == nil || !strings.Contains(err.Error(), "default/web/nginx") || !strings.Contains(err.Error(), "default/api/nginx") {
		t.Errorf("an ambiguous name must list the candidates, got %v", err)
	}
	for _, ref := range []string{"", "ab", "nope"} {
		if o, err := find(ref, all); err == nil {
			t.Errorf("%q found %v", ref, o)
		}
	}
}

func TestUnits(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1 << 30: "1.0 GiB", 1<<64 - 1: "16.0 EiB"} {
		if got := size(n); got != want {
			t.Errorf("size %d: %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-1: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 3 * time.Hour: "3h", 72 * time.Hour: "3d"} {
		if got := age(d); got != want {
			t.Errorf("age %s: %q, want %q", d, got, want)
		}
	}
}

const stamp = "2030-01-02T03:04:05.000000001Z "

func logFile(t *testing.T, lines ...string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "0.log")
	if err := os.WriteFile(p, []byte(strings.Join(lines, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLogs(t *testing.T) {
	lines := []string{
		stamp + "stdout F one\n", stamp + "stderr F oops\n", stamp + "stdout P two \n", stamp + "stdout P and \n", stamp + "stdout F a half\n",
		stamp + "stdout F \n", stamp + "stdout F raw\x00\xff\r\n", stamp + "stdout P no newline\n",
	}
	for _, tt := range []struct {
		tail        int
		out, errOut string
	}{
		{-1, "one\ntwo and a half\n\nraw\x00\xff\r\nno newline", "oops\n"},
		{4, "two and a half\n\nraw\x00\xff\r\nno newline", ""},
		{1, "no newline", ""},
		{0, "", ""},
		{1 << 40, "one\ntwo and a half\n\nraw\x00\xff\r\nno newline", "oops\n"},
	} {
		var out, errOut bytes.Buffer
		l := &logReader{out: &out, errOut: &errOut, path: logFile(t, lines...)}
		if err := l.run(t.Context(), tt.tail); err != nil {
			t.Errorf("tail %d: %v", tt.tail, err)
		}
		if out.String() != tt.out || errOut.String() != tt.errOut {
			t.Errorf("tail %d: got %q and %q, want %q and %q", tt.tail, out.String(), errOut.String(), tt.out, tt.errOut)
		}
	}
	l := &logReader{out: &bytes.Buffer{}, path: logFile(t, "no log at all\n")}
	if err := l.run(t.Context(), -1); err == nil || !strings.Contains(err.Error(), "CRI log format") {
		t.Errorf("got %v", err)
	}
}

// A follower sees every line across a rotation, and ends with the container.
func TestLogsFollow(t *testing.T) {
	path := logFile(t, stamp+"stdout F 1\n")
	var alive atomic.Bool
	alive.Store(true)
	var out bytes.Buffer
	l := &logReader{out: &out, path: path, running: func(context.Context) bool { return alive.Load() }}
	done := make(chan error, 1)
	go func() { done <- l.run(t.Context(), -1) }()
	add := func(s string) {
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if _, err := f.WriteString(s); err != nil {
			t.Error(err)
		}
	}
	time.Sleep(followInterval / 2)
	add(stamp + "stdout F 2\n" + stamp + "stdo")
	time.Sleep(2 * followInterval)
	add("ut F 3\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * followInterval)
	add(stamp + "stdout F 4\n")
	time.Sleep(3 * followInterval)
	add(stamp + "stdout F 5\n")
	alive.Store(false)
	select {
	case err := <-done:
		if err != nil || out.String() != "1\n2\n3\n4\n5\n" {
			t.Errorf("got %q, %v", out.String(), err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the follower does not end")
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(stamp + "stdout F x\n"))
	f.Add([]byte(stamp + "stderr P:tag \n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, content, ok := parseRecord(b)
		if ok && !bytes.HasSuffix(b, content) {
			t.Errorf("%q: content %q is not its end", b, content)
		}
	})
}

func TestProgressLine(t *testing.T) {
	var b bytes.Buffer
	p := &progress{w: &b, width: 40}
	p.update(pullapi.Message{Layer: "a", Done: 5 << 20, Total: 10 << 20})
	p.update(pullapi.Message{Layer: "b", Done: 10 << 20, Total: 10 << 20, Complete: true})
	if got, want := p.line(3*time.Second), "[######################--------]  15.0 MiB of 20.0 MiB  1 of 2 layers  3s"; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	for _, l := range strings.Split(b.String(), "\r\x1b[K") {
		if len(l) >= 40 {
			t.Errorf("line %q is wider than the terminal", l)
		}
	}
}

func TestChecks(t *testing.T) {
	list := runChecks(t.Context(), nil, []check{
		{"good", true, func(context.Context, *env) (string, error) { return "here", nil }},
		{"wanted", false, func(context.Context, *env) (string, error) { return "", remedy(errors.New("gone"), "fetch %s", "it") }},
		{"needed", true, func(context.Context, *env) (string, error) { return "", errors.New("gone") }},
	})
	want := []finding{{"good", checkOK, "here", ""}, {"wanted", checkWarn, "gone", "fetch it"}, {"needed", checkFail, "gone", ""}}
	for i := range want {
		if list[i] != want[i] {
			t.Errorf("got %+v, want %+v", list[i], want[i])
		}
	}
}

// The probes run for real; on any kernel each either finds something or says
// what to do.
func TestProbesExplainThemselves(t *testing.T) {
	for _, c := range checks(t.TempDir()) {
		if c.name == "daemon" {
			continue // needs a connection
		}
		found, err := c.probe(t.Context(), nil)
		var r *remedied
		switch {
		case err == nil && found == "":
			t.Errorf("%s found nothing and says nothing", c.name)
		case err != nil && !(errors.As(err, &r) && r.remedy != ""):
			t.Errorf("%s: %v has no remedy", c.name, err)
		}
	}
}

func TestRootDirectoryThatIsNotThereYet(t *testing.T) {
	if _, err := rootDirectory(filepath.Join(t.TempDir(), "a", "b")); err != nil {
		t.Skipf("the scratch filesystem cannot hold layers: %v", err)
	}
}

func TestUnknownOutput(t *testing.T) {
	cmd := command()
	cmd.SetArgs([]string{"ps", "-o", "yaml"})
	if err := cmd.Execute(); err == nil || !strings.Contains(err.Error(), "table or json") {
		t.Errorf("got %v", err)
	}
}
