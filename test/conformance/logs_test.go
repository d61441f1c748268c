package conformance

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestLogFormat(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "log-samples") // "line one\n", "\n", "cr\r\n", "nul\x00byte\n", 40,000 x "x" + "\n", "no newline" on stdout; "to stderr\n" on stderr
	if s := waitExit(t, c); s.ExitCode != 0 {
		t.Fatalf("exit %d", s.ExitCode)
	}
	var out, errs []record
	for _, r := range logs(t, c) {
		if r.stream == "stderr" {
			errs = append(errs, r)
		} else {
			out = append(out, r)
		}
	}
	long := strings.Repeat("x", 40000)
	want := []record{{tag: "F", content: "line one"}, {tag: "F", content: ""}, {tag: "F", content: "cr\r"}, {tag: "F", content: "nul\x00byte"},
		{tag: "P", content: long[:16384]}, {tag: "P", content: long[:16384]}, {tag: "F", content: long[:40000-2*16384]}, {tag: "P", content: "no newline"}}
	var got, wanted strings.Builder
	for _, r := range out { // a partial record may be split further by the pipe: compare the joined text
		got.WriteString(r.content)
		if r.tag == "F" {
			got.WriteByte('\n')
		}
		if len(r.content) > 16384 {
			t.Errorf("record of %d bytes", len(r.content))
		}
	}
	for _, r := range want {
		wanted.WriteString(r.content)
		if r.tag == "F" {
			wanted.WriteByte('\n')
		}
	}
	if got.String() != wanted.String() {
		t.Errorf("stdout records differ from what was written (%d and %d bytes)", got.Len(), wanted.Len())
	}
	if len(errs) != 1 || errs[0].content != "to stderr" || errs[0].tag != "F" {
		t.Errorf("stderr = %v", errs)
	}
}

func TestReopenLosesNothing(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "count", "3000", "100") // n lines, microseconds between
	path := containerStatus(t, c).LogPath
	var files []string
	for i := range 5 {
		time.Sleep(50 * time.Millisecond)
		old := fmt.Sprintf("%s.%d", path, i)
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		if _, err := node.Runtime.ReopenContainerLog(ctx(t), &cri.ReopenContainerLogRequest{ContainerId: c}); err != nil {
			t.Fatal(err)
		}
		files = append(files, old)
	}
	waitExit(t, c)
	next := 0
	for _, f := range append(files, path) {
		for _, r := range readLog(t, f) {
			if r.content != fmt.Sprint(next) {
				t.Fatalf("%s: %q where %d was due", f, r.content, next)
			}
			next++
		}
	}
	if next != 3000 {
		t.Fatalf("%d of 3000 lines", next)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_, err := node.Runtime.ReopenContainerLog(ctx(t), &cri.ReopenContainerLogRequest{ContainerId: c})
	wantCode(t, err, codes.FailedPrecondition, "running")
	if _, err := os.Stat(path); err == nil {
		t.Error("reopen of an exited container made a file")
	}
}

func TestLogIsCompleteBeforeExited(t *testing.T) {
	p := runPod(t, nil)
	for range 5 {
		c := run(t, p, "print", "5000", "99")
		waitExit(t, c)
		if n := len(logs(t, c)); n != 5000 {
			t.Fatalf("%d of 5000 lines when EXITED shows", n)
		}
	}
}

func TestNoLogFileBeforeStart(t *testing.T) {
	p := runPod(t, nil)
	c := create(t, p, nil)
	if _, err := os.Stat(containerStatus(t, c).LogPath); err == nil {
		t.Error("CreateContainer made the log file")
	}
	start(t, c)
	if _, err := os.Stat(containerStatus(t, c).LogPath); err != nil {
		t.Error(err)
	}
}
