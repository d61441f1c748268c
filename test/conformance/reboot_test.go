package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/sandbox/journal"
	"github.com/berth-runtime/berth/test/pace"
)

// recordingPlugin is a CNI plugin that answers ADD and writes down every call.
const recordingPlugin = `#!/bin/sh
config=$(cat)
echo "$CNI_COMMAND $CNI_CONTAINERID netns=$CNI_NETNS $config" | tr '\n' ' ' >> %[1]s
echo >> %[1]s
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"10.99.7.5/24","interface":0}]}';;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}';;
esac
`

// withPlugin has the pods that run makes attached by a recording plugin, and
// returns its calls so far.
func withPlugin(t *testing.T, run func()) (calls func() []string) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "calls")
	conf := filepath.Join(node.Dir, "net.d", "10-recording.conflist")
	for file, text := range map[string]string{
		filepath.Join(node.Dir, "cni-bin", "recording"): fmt.Sprintf(recordingPlugin, log),
		conf: `{"cniVersion":"1.0.0","name":"recorded","plugins":[{"type":"recording"}]}`,
	} {
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(file) })
	}
	restart(t, nil)
	run()
	if err := os.Remove(conf); err != nil {
		t.Fatal(err)
	}
	return func() []string {
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(string(b)), "\n")
	}
}

// reboot does to the node what a reboot does: every process ends, what the kernel
// held and the state folder (a tmpfs in production) are gone, and the boot has
// another id. edit changes a record on the way.
func reboot(t *testing.T, pids []int, edit func(key string, rec map[string]any)) {
	t.Helper()
	supervisor := node.SupervisorPid()
	restart(t, func() {
		for _, pid := range append([]int{supervisor}, pids...) {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Error(err)
			}
		}
		for _, pid := range append(pids, supervisor) {
			for deadline := time.Now().Add(pace.Wait(15 * time.Second)); syscall.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Errorf("process %d does not end", pid)
					break
				}
			}
		}
		run := filepath.Join(node.Dir, "run")
		unmountBelow(t, run)
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
		for _, kind := range []string{"pods", "containers"} {
			book, err := journal.Open(filepath.Join(node.Dir, "root", "sandboxes", kind))
			if err != nil {
				t.Fatal(err)
			}
			if err := book.Load(func(key string, body []byte) error {
				var rec map[string]any
				if err := json.Unmarshal(body, &rec); err != nil {
					return err
				}
				rec["bootID"] = "00000000-0000-0000-0000-000000000000"
				if edit != nil {
					edit(key, rec)
				}
				if cgroup, _ := rec["cgroup"].(string); strings.HasPrefix(cgroup, "/berth/") {
					for _, h := range hierarchies(t) {
						_ = unix.Rmdir(filepath.Join(h, cgroup))
					}
				}
				return book.Write(key, rec)
			}); err != nil {
				t.Error(err)
			}
		}
	})
}

func unmountBelow(t *testing.T, dir string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for _, l := range slices.Backward(lines) {
		if f := strings.Fields(l); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			_ = unix.Unmount(f[1], unix.MNT_DETACH)
		}
	}
}

// TestReboot: what was on the node before is reported as ended, can be stopped
// and removed with a DEL for each attachment, and leaves nothing.
func TestReboot(t *testing.T) {
	p := runPod(t, nil)
	running, created := run(t, p, "sleep", "1000"), create(t, p, nil)
	exited := run(t, p, "exit", "3")
	waitExit(t, exited)
	starting, removing := create(t, p, nil), create(t, p, nil)
	stopping, going, half := runPod(t, nil), runPod(t, nil), runPod(t, nil)
	lost := run(t, going, "sleep", "1000")
	var plugged, pluggedStopping *pod
	calls := withPlugin(t, func() { plugged, pluggedStopping = runPod(t, nil), runPod(t, nil) })
	if ip := podStatus(t, plugged.id).Network.Ip; ip != "10.99.7.5" {
		t.Fatalf("the pod is not on the plugin's network: %q", ip)
	}
	old := podStatus(t, p.id)
	reboot(t, []int{pidOf(t, running), pidOf(t, lost)}, func(key string, rec map[string]any) {
		if state := map[string]string{starting: "starting", removing: "removing", stopping.id: "stopping",
			pluggedStopping.id: "stopping", going.id: "removing", half.id: "creating"}[key]; state != "" {
			rec["state"] = state
		}
	})
	half.id = "" // its caller never got an id
	for _, q := range []*pod{p, stopping, plugged, pluggedStopping} {
		s := podStatus(t, q.id)
		if s.State != cri.PodSandboxState_SANDBOX_NOTREADY || s.CreatedAt == 0 || s.Metadata.Uid != q.config.Metadata.Uid {
			t.Errorf("pod: %v", s)
		}
	}
	if s := podStatus(t, p.id); s.CreatedAt != old.CreatedAt || s.Network.GetIp() != old.Network.GetIp() {
		t.Errorf("pod: %v, was %v", s, old)
	}
	r, err := node.Runtime.PodSandboxStatus(ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil || !strings.Contains(r.Info["info"], "the node was rebooted") {
		t.Errorf("pod info: %v %v", r.GetInfo(), err)
	}
	for _, c := range []string{running, created, starting} {
		if s := containerStatus(t, c); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 255 || s.Reason != "Unknown" ||
			!strings.Contains(s.Message, "rebooted") || s.FinishedAt < s.StartedAt || s.FinishedAt == 0 {
			t.Errorf("container: %v", s)
		}
	}
	if s := containerStatus(t, exited); s.ExitCode != 3 {
		t.Errorf("container that had ended: %v", s)
	}
	for deadline := time.Now().Add(pace.Wait(15 * time.Second)); ; time.Sleep(10 * time.Millisecond) {
		list, err := node.Runtime.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(list.Items, func(s *cri.PodSandbox) bool {
			return s.Id == going.id || s.Metadata.Uid == half.config.Metadata.Uid
		}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a removal is not finished, or a half-made pod is still there: %v", list.Items)
		}
	}
	// The kubelet's retry of the half-made pod, which is the first of this boot.
	rr, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: half.config})
	if err != nil {
		t.Fatal(err)
	}
	half.id = rr.PodSandboxId
	if names := networkRecords(t); !slices.Equal(names, []string{half.id + ".json"}) {
		t.Errorf("addresses are held for %v, want only %s", names, half.id)
	}
	dels := func(pod string) (out []string) {
		for _, c := range calls() {
			if strings.HasPrefix(c, "DEL "+pod) {
				out = append(out, c)
			}
		}
		return out
	}
	for _, q := range []*pod{plugged, pluggedStopping} {
		if d := dels(q.id); len(d) != 0 {
			t.Errorf("a DEL that nobody asked for: %v", d)
		}
		if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: q.id}); err != nil {
			t.Error(err)
		}
		d := dels(q.id)
		if len(d) != 1 || !strings.Contains(d[0], "netns= ") || !strings.Contains(d[0], `"prevResult"`) || !strings.Contains(d[0], "10.99.7.5/24") {
			t.Errorf("DEL: %v", d)
		}
	}
	for _, q := range []*pod{p, stopping, plugged, pluggedStopping} {
		if _, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: q.id}); err != nil {
			t.Error(err)
		}
	}
	for _, q := range []*pod{plugged, pluggedStopping} {
		if d := dels(q.id); len(d) != 1 {
			t.Errorf("DEL more than once: %v", d)
		}
	}
	for _, c := range []string{running, created, exited, starting, removing, lost} {
		for _, left := range []string{filepath.Join("root", "containers", c[:1], c), filepath.Join("root", "sandboxes", "containers", c+".json")} {
			if _, err := os.Stat(filepath.Join(node.Dir, left)); !os.IsNotExist(err) {
				t.Errorf("left behind: %s (%v)", left, err)
			}
		}
	}
	for _, q := range []*pod{p, stopping, going, plugged, pluggedStopping} {
		for _, left := range []string{filepath.Join("run", "pods", q.id), filepath.Join("root", "sandboxes", "pods", q.id+".json")} {
			if _, err := os.Stat(filepath.Join(node.Dir, left)); !os.IsNotExist(err) {
				t.Errorf("left behind: %s (%v)", left, err)
			}
		}
		for _, h := range hierarchies(t) {
			if _, err := os.Stat(filepath.Join(h, "berth", q.id)); !os.IsNotExist(err) {
				t.Errorf("left behind: cgroup %s/berth/%s (%v)", h, q.id, err)
			}
		}
	}
}

// networkRecords are the files of the built-in network's attached pods.
func networkRecords(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(node.Dir, "run", "network", "pods"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
