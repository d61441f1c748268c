package conformance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/testimage"
)

func binary(t *testing.T, name string) string {
	t.Helper()
	bin, err := harness.Bin()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(bin, name)
}

// berth runs the operator's program against the suite's daemon.
func berth(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	cmd := exec.CommandContext(ctx(t), binary(t, "berth"), args...)
	cmd.Env = append(os.Environ(), "BERTH_SOCKET="+node.Socket)
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

func TestOperatorCommands(t *testing.T) {
	p := runPod(t, nil)
	a, b := run(t, p, "both", "to out", "to err"), run(t, p, "sleep", "1000")
	unstarted := create(t, p, nil)
	waitExit(t, a)
	name := containerStatus(t, b).Metadata.Name
	for _, row := range []struct {
		args      string
		code      int
		out, errs string
	}{
		{"ps", 0, p.config.Metadata.Name, ""},
		{"ps -a", 0, "exited", ""},
		{"images", 0, "prog:1", ""},
		{"logs " + a[:12], 0, "to out\n", "to err\n"},
		{"logs --tail 0 " + a, 0, "", ""},
		{"logs " + unstarted, 1, "", "not started yet"},
		{"logs no-such-thing", 1, "", "no such object"},
		{"exec " + name + " /bin/echo by name", 0, "by name\n", ""},
		{"exec " + p.config.Metadata.Name + "/" + name + " /bin/exit 42", 42, "", ""},
		{"exec -i " + b + " /bin/both x y", 0, "x\n", "y\n"},
		{"exec " + a + " /bin/true", 1, "", "running"},
		{"exec " + b + " /no/such", 1, "", "/no/such"},
		{"exec " + b, 1, "", "arg"},
		{"inspect " + p.id, 0, `"kind": "pod"`, ""},
		{"inspect " + b[:9], 0, b, ""},
		{"inspect", 1, "", "arg"},
		{"pull " + images.Ref("no/such:1"), 1, "", images.Ref("no/such:1")},
		{"pull UPPER/Case:x", 1, "", "UPPER/Case"},
		{"version", 0, "daemon", ""},
	} {
		out, errs, code := berth(t, strings.Fields(row.args)...)
		if code != row.code || !strings.Contains(out, row.out) || !strings.Contains(errs, row.errs) {
			t.Errorf("berth %s: %d\n%s%s", row.args, code, out, errs)
		}
		if strings.Contains(errs, "rpc error") || strings.Contains(errs, "goroutine") {
			t.Errorf("berth %s: not for people: %s", row.args, errs)
		}
	}
	for _, args := range []string{"ps", "ps -a", "images", "version", "inspect " + b, "inspect " + p.id, "inspect " + images.prog, "pull " + images.prog} {
		out, errs, code := berth(t, append(strings.Fields(args), "-o", "json")...)
		if code != 0 || errs != "" || !json.Valid([]byte(out)) {
			t.Errorf("berth %s -o json: %d %s\n%s", args, code, errs, out)
		}
	}
	if err := os.Remove(containerStatus(t, a).LogPath); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := berth(t, "logs", a); code != 1 || !strings.Contains(errs, "removed") {
		t.Errorf("logs of a removed file: %d %s", code, errs)
	}
}

// terminal makes a pseudo terminal of 80 columns.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// TestPullProgressOnATerminal: bars while it lasts, one plain line in the end.
func TestPullProgressOnATerminal(t *testing.T) {
	ref := push(t, "progress", testimage.Uncompressed)
	defer images.fault("progress", func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if strings.Contains(q.URL.Path, "/blobs/") {
			time.Sleep(200 * time.Millisecond)
		}
		next.ServeHTTP(w, q)
	})()
	master, slave := terminal(t)
	cmd := exec.CommandContext(ctx(t), binary(t, "berth"), "--socket", node.Socket, "pull", ref)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	out, _ := io.ReadAll(master) // EIO when the last writer is gone
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text := string(out)
	if !strings.Contains(text, "layers") || !strings.Contains(text, "[#") && !strings.Contains(text, "[-") {
		t.Errorf("no progress: %q", text)
	}
	last := text[strings.LastIndex(text, "\x1b[K")+3:]
	if !strings.HasPrefix(last, ref+"  ") || strings.Count(last, "\n") != 1 {
		t.Errorf("last line: %q", last)
	}
	for _, line := range strings.Split(text, "\r\x1b[K") {
		if len(strings.TrimRight(line, "\r\n")) > 80 && !strings.HasPrefix(line, ref) {
			t.Errorf("a progress line wraps: %q", line)
		}
	}
}

// TestExecOnATerminal: `berth exec -it` with a real terminal: size, echo, exit code.
func TestExecOnATerminal(t *testing.T) {
	c := run(t, runPod(t, nil), "sleep", "1000")
	master, slave := terminal(t)
	cmd := exec.CommandContext(ctx(t), binary(t, "berth"), "--socket", node.Socket, "exec", "-i", "-t", c, "/bin/prog", "tty", "wait")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	time.Sleep(500 * time.Millisecond)
	if _, err := io.WriteString(master, "go\r"); err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(master)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "stdin=1 stdout=1 stderr=1 rows=24 cols=80") {
		t.Errorf("%q", out)
	}
}

// TestDaemonCommandLine: precedence of flags, file and defaults, and what is
// said of a file that is wrong.
func TestDaemonCommandLine(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "c.toml")
	config := func(toml string, args ...string) (string, int) {
		t.Helper()
		if err := os.WriteFile(file, []byte(toml), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(ctx(t), binary(t, "berthd"), append([]string{"config", "--config", file}, args...)...)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	out, code := config("root = '/from/file'\nstate = '/state/of/file'\n[streaming]\nidle_timeout = '1h'\n", "--root", "/from/flag")
	lines := strings.Split(out, "\n")
	for _, want := range [][]string{
		{"root = '/from/flag'", "# flag --root"}, {"state = '/state/of/file'", "# file " + file}, {"socket = '/run/berth/berth.sock'", "# default"},
		{"cni_conf_dir = '/etc/cni/net.d'", "# default"}, {"cni_bin_dir = '/opt/cni/bin'", "# default"}, {"registry_config_dir = '/etc/berth/certs.d'", "# default"},
		{"idle_timeout = '1h0m0s'", "# file"},
	} {
		found := false
		for _, l := range lines {
			found = found || strings.HasPrefix(l, want[0]) && strings.Contains(l, want[1])
		}
		if !found {
			t.Errorf("no line %q in\n%s", want, out)
		}
	}
	if code != 0 {
		t.Errorf("code %d", code)
	}
	for toml, want := range map[string]string{
		"rooot = '/x'":                    `unknown key "rooot"; did you mean "root"?`,
		"[streaming]\nadress = 'x'":       `unknown key "streaming.adress"; did you mean "streaming.address"?`,
		"[streeming]\naddress = 'x'":      "streeming",
		"root = 5":                        "c.toml:1",
		"root = 'relative'":               "not an absolute path",
		"log_level = 'loud'":              "debug",
		"metrics_address = 'nonsense'":    "host:port",
		"root = '/a'\nroot = '/b'":        "c.toml:2",
		"[network]\nsubnets = ['10.0.0']": "subnets",
	} {
		if out, code := config(toml); code != 1 || !strings.Contains(out, want) {
			t.Errorf("%q: %d %s, want %q", toml, code, out, want)
		}
	}
	cmd := exec.CommandContext(ctx(t), binary(t, "berthd"), "--config", filepath.Join(dir, "none"))
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "none") {
		t.Errorf("a named file that is missing: %v %s", err, out)
	}
}

// TestASecondDaemonIsRefused, on the same state folder and on the same socket,
// and the first one does not notice.
func TestASecondDaemonIsRefused(t *testing.T) {
	dir := t.TempDir()
	for want, args := range map[string][]string{
		"root directory " + filepath.Join(node.Dir, "root") + " is in use": {"--root", filepath.Join(node.Dir, "root"), "--state", dir + "/state3", "--socket", dir + "/s3"},
		"in use by another berthd": {"--root", dir + "/root", "--state", filepath.Join(node.Dir, "run"), "--socket", dir + "/s"},
		"another daemon answers":   {"--root", dir + "/root2", "--state", dir + "/state2", "--socket", node.Socket},
	} {
		cmd := exec.CommandContext(ctx(t), binary(t, "berthd"), append([]string{"--config", "/dev/null", "--cni-conf-dir", dir, "--cni-bin-dir", dir}, args...)...)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%v\n%s\nwant %q", err, out, want)
		}
	}
	p := runPod(t, nil)
	if out := execOut(t, run(t, p, "sleep", "1000"), "/bin/echo", "fine"); out != "fine\n" {
		t.Errorf("the first daemon after that: %q", out)
	}
}

// TestDaemonNeverPanicked looks at the log of all tests so far.
func TestDaemonNeverPanicked(t *testing.T) {
	_, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{})
	wantCode(t, err, codes.InvalidArgument, "config")
	b, err := os.ReadFile(node.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"panic", "goroutine ", "DATA RACE"} {
		if i := bytes.Index(b, []byte(word)); i >= 0 {
			t.Errorf("the daemon's log says %q: %s", word, b[i:min(i+500, len(b))])
		}
	}
}
