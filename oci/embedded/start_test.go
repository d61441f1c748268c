package embedded

import (
	"strings"
	"testing"
)

func TestStart(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "hostname:", "pid:", "id:", "fds:", "mounts:", "ls:/", "ls:/dev", "status:Seccomp", "read:/proc/self/cgroup", "write:/tmp/x", "ls:/proc/acpi")
	out := c.output(r)
	t.Log(out)
	for k, want := range map[string]string{
		"hostname:": "berth-test", "pid:": "1", "id:": "0 0 []", "fds:": "0,1,2", "write:/tmp/x": "ok",
	} {
		if got := value(t, out, k); got != want {
			t.Errorf("%s = %q, want %q", k, got, want)
		}
	}
	if m := value(t, out, "mounts:"); !strings.HasPrefix(m, "/") {
		t.Errorf("mounts %q", m)
	}
}
