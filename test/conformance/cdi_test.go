package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cdiDevice writes a spec file of a device "berth.test/<name>=0", as device plugins
// do, for the length of the test.
func cdiDevice(t *testing.T, edits map[string]any) (name string) {
	t.Helper()
	class := fmt.Sprintf("c%d-%d", os.Getpid(), len(t.Name()))
	b, err := json.Marshal(map[string]any{
		"cdiVersion": "0.6.0", "kind": "berth.test/" + class, "devices": []any{map[string]any{"name": "0", "containerEdits": edits}},
	})
	if err != nil {
		t.Fatal(err)
	}
	const dir = "/var/run/cdi"
	_, err = os.Stat(dir)
	fresh := os.IsNotExist(err)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "berth.test-"+class+".json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.Remove(file)
		if fresh {
			_ = os.Remove(dir)
		}
	})
	return "berth.test/" + class + "=0"
}

// TestCDIHooks: the hooks of a device's spec file find the bundle, and the root
// where its config.json says, in the container's mount namespace.
func TestCDIHooks(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "hook")
	const text = `#!/bin/sh
s=$(cat)
echo "$1 $s" >>"$log"
b=$(echo "$s" | sed 's/.*"bundle":"\([^"]*\)".*/\1/')
[ "$1" = inside ] || exit 0
r=$(sed 's/.*"root":{"path":"\([^"]*\)".*/\1/' "$b/config.json")
mount -t tmpfs hook "$r/tmp" && echo yes >"$r/tmp/hooked"
`
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, "log")
	hook := func(name, arg string) map[string]any {
		return map[string]any{"hookName": name, "path": script, "args": []string{"hook", arg}, "env": []string{"PATH=/usr/bin:/bin:/usr/sbin:/sbin", "log=" + log}}
	}
	device := cdiDevice(t, map[string]any{
		"env":   []string{"GPU=0"},
		"hooks": []any{hook("createRuntime", "runtime"), hook("createContainer", "inside"), hook("poststop", "stop")},
	})
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) { c.CDIDevices = []*cri.CDIDevice{{Name: device}} })
	if out := execOut(t, c, "/bin/cat", "/tmp/hooked"); out != "yes\n" {
		t.Errorf("the hook's file: %q", out)
	}
	if out := execOut(t, c, "/bin/cat", "/proc/self/mountinfo"); strings.Contains(out, dir) {
		t.Errorf("mounts of the host are in the container:\n%s", out)
	}
	stop(t, c, 0)
	if _, err := node.Runtime.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: c}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) != 3 {
		t.Fatalf("log:\n%s", b)
	}
	for i, want := range []string{"runtime", "inside", "stop"} {
		arg, state, _ := strings.Cut(lines[i], " ")
		var s specs.State
		if err := json.Unmarshal([]byte(state), &s); err != nil || arg != want || s.ID != c || s.Bundle == "" {
			t.Errorf("hook %d: %s (%v)", i, lines[i], err)
		}
	}
}

// TestCDIHookFails: the failed hook is named, and the container can be removed.
func TestCDIHookFails(t *testing.T) {
	device := cdiDevice(t, map[string]any{"hooks": []any{map[string]any{"hookName": "createContainer", "path": "/no/such/hook"}}})
	p := runPod(t, nil)
	c := create(t, p, func(c *cri.ContainerConfig) { c.CDIDevices = []*cri.CDIDevice{{Name: device}} })
	_, err := node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: c})
	wantCode(t, err, codes.Internal, `hooks.createContainer[0] "/no/such/hook"`)
}
