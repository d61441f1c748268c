package faults

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// damage is one way in which a file is not what was written.
type damage struct {
	name string
	do   func(whole []byte) []byte
}

// damages are truncations and flipped bits all over a file.
func damages(steps int) []damage {
	var out []damage
	for i := range steps {
		at := func(n int) int { return min(n-1, n*i/(steps-1)) }
		out = append(out,
			damage{fmt.Sprintf("cut at %d/%d", i, steps-1), func(b []byte) []byte { return b[:at(len(b))] }},
			damage{fmt.Sprintf("bit %d flipped at %d/%d", i%8, i, steps-1), func(b []byte) []byte {
				b = bytes.Clone(b)
				b[at(len(b))] ^= 1 << (i % 8)
				return b
			}})
	}
	return append(out,
		damage{"newlines and colons gone", func(b []byte) []byte {
			return bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("\n"), []byte(" ")), []byte(":"), []byte(" "))
		}},
		damage{"zeroes", func(b []byte) []byte { return make([]byte, len(b)) }})
}

// spoil kills the daemon, damages the file and starts it again.
func (n *node) spoil(path string, d damage) {
	n.t.Helper()
	if err := n.Kill(syscall.SIGKILL); err != nil {
		n.t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(path, d.do(whole), 0o600); err != nil {
		n.t.Fatal(err)
	}
	n.up()
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// soonReconciled lets what no record wants any more go soon.
const soonReconciled = "[runtime]\nreconcile = \"200ms\"\n"

// TestDamagedPodRecord: a pod whose record is damaged is as before, or it is gone
// with all it held, its record is kept aside and the log says so. The other pod
// does not notice.
func TestDamagedPodRecord(t *testing.T) {
	n := configured(t, soonReconciled)
	other := n.pod()
	beside := n.run(other, "sleep", "1000")
	before := n.tree()
	for _, d := range damages(6) {
		victim := n.pod()
		c := n.run(victim, "sleep", "1000")
		pid := n.pidOf(c)
		record := filepath.Join(n.Dir, "root/sandboxes/pods", victim.id+".json")
		n.spoil(record, d)
		n.alive(beside)
		n.ready()
		if state, ok := n.pods()[victim.id]; ok {
			if state == cri.PodSandboxState_SANDBOX_READY {
				n.alive(c)
			}
			n.removePod(victim.id)
		} else {
			n.eventually(d.name+": the lost pod's process ends", func() bool { return unix.Kill(pid, 0) != nil })
			if exists(record + ".bad") {
				n.says(victim.id + ".json.bad")
				if err := os.Remove(record + ".bad"); err != nil {
					t.Fatal(err)
				}
			} else if !strings.HasPrefix(d.name, "cut") {
				t.Errorf("%s: the record is not kept", d.name)
			}
		}
		n.same(d.name, before)
	}
}

// TestDamagedContainerRecord: the same for a container; its pod lives.
func TestDamagedContainerRecord(t *testing.T) {
	n := configured(t, soonReconciled)
	p := n.pod()
	beside := n.run(p, "sleep", "1000")
	before := n.tree()
	for _, d := range damages(6) {
		c := n.run(p, "sleep", "1000")
		pid := n.pidOf(c)
		record := filepath.Join(n.Dir, "root/sandboxes/containers", c+".json")
		n.spoil(record, d)
		n.alive(beside)
		if state, ok := n.containers()[c]; ok {
			if state == cri.ContainerState_CONTAINER_RUNNING {
				n.alive(c)
			}
			if err := n.tryRemove(c); err != nil {
				t.Errorf("%s: remove: %v", d.name, err)
			}
		} else {
			n.eventually(d.name+": the lost container's process ends", func() bool { return unix.Kill(pid, 0) != nil })
			if exists(record + ".bad") {
				n.says(c + ".json.bad")
				if err := os.Remove(record + ".bad"); err != nil {
					t.Fatal(err)
				}
			} else if !strings.HasPrefix(d.name, "cut") {
				t.Errorf("%s: the record is not kept", d.name)
			}
		}
		n.eventually(d.name+": nothing of it is left", func() bool { return len(n.tree()) <= len(before) })
		n.same(d.name, before)
	}
	n.alive(n.run(p, "sleep", "1000"))
}

// pidOf is the first process of a running container, in the host's numbers.
func (n *node) pidOf(c string) int {
	n.t.Helper()
	r, err := n.Runtime.ContainerStatus(n.ctx(), &cri.ContainerStatusRequest{ContainerId: c, Verbose: true})
	if err != nil {
		n.t.Fatal(err)
	}
	_, after, ok := strings.Cut(r.Info["info"], `"pid":`)
	var pid int
	if _, err := fmt.Sscan(strings.TrimLeft(after, " "), &pid); !ok || err != nil || pid < 2 {
		n.t.Fatalf("no pid in %v", r.Info)
	}
	return pid
}

// TestDamagedImageRecords: containers run on though the records of their image
// are damaged, also when they open files that nobody had open before; the image
// is pulled again and good for new ones.
func TestDamagedImageRecords(t *testing.T) {
	for what, pattern := range map[string]string{"index": "root/images/index/*.json", "layer": "root/images/layers/*/layer.json"} {
		t.Run(what, func(t *testing.T) {
			n := started(t)
			p := n.pod()
			for _, d := range damages(4) {
				c := n.run(p, "sleep", "1000")
				paths, err := filepath.Glob(filepath.Join(n.Dir, pattern))
				if err != nil || len(paths) == 0 {
					t.Fatalf("%v, %v", paths, err)
				}
				n.spoil(paths[0], d)
				n.ready()
				n.alive(c)
				for _, cmd := range [][]string{{"/bin/ls", "/bin"}, {"/bin/cat", "/etc/passwd"}} {
					if out, err := n.exec(c, cmd...); err != nil || out == "" {
						t.Errorf("%s: %v in a container that runs: %q, %v", d.name, cmd, out, err)
					}
				}
				n.pull(prog)
				n.alive(n.run(p, "sleep", "1000"))
				n.alive(c)
			}
			n.says("set aside")
			n.removePod(p.id)
		})
	}
}

// TestDamagedNetworkRecord: a pod keeps its address, link and published port
// though the network's record of it, or the whole folder's mark, is damaged.
func TestDamagedNetworkRecord(t *testing.T) {
	n := started(t)
	c := n.PodConfig()
	c.PortMappings = []*cri.PortMapping{{ContainerPort: 8080, HostPort: 18777}}
	p := &pod{config: c}
	var err error
	if p.id, err = n.tryPod(c); err != nil {
		t.Fatal(err)
	}
	server := n.run(p, "serve", ":8080")
	ip := n.ip(p)
	for _, file := range []string{"pods/" + p.id + ".json", "boot_id", "pod_cidr"} {
		if _, err := n.Runtime.UpdateRuntimeConfig(n.ctx(), &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{
			NetworkConfig: &cri.NetworkConfig{PodCidr: "10.77.0.0/24"}}}); err != nil {
			t.Fatal(err)
		}
		for _, d := range damages(4) {
			path := filepath.Join(n.Dir, "run/network", file)
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			n.spoil(path, d)
			n.ready()
			n.alive(server)
			if got := n.ip(p); got != ip {
				t.Fatalf("%s %s: address %s, was %s", file, d.name, got, ip)
			}
			for _, at := range []string{ip + ":8080", "127.0.0.1:18777"} {
				if err := answers(at); err != nil {
					t.Errorf("%s %s: %s: %v", file, d.name, at, err)
				}
			}
			q := n.pod()
			if got := n.ip(q); got == ip {
				t.Errorf("%s %s: the address %s was given out again", file, d.name, ip)
			}
			n.removePod(q.id)
			if err := os.WriteFile(path, whole, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	n.removePod(p.id)
	if left := files(t, filepath.Join(n.Dir, "run/network/pods")); len(left) > 0 && !strings.HasSuffix(left[0], ".bad") {
		t.Errorf("left %v", left)
	}
}

// TestDamagedCNIJournal: DEL still runs, with what the engine knows of the pod.
func TestDamagedCNIJournal(t *testing.T) {
	n, dir := plugged(t)
	for _, d := range damages(4) {
		p := n.pod()
		n.spoil(filepath.Join(n.Dir, "run/cni/attachments", p.id+".json"), d)
		n.removePod(p.id)
		if err := os.Remove(filepath.Join(n.Dir, "run/cni/attachments", p.id+".json.bad")); err != nil {
			t.Errorf("%s: the journal is not kept: %v", d.name, err)
		}
		nothingOf(n, dir)
	}
	b, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil || strings.Count(string(b), "DEL") < len(damages(4)) {
		t.Errorf("calls %s, %v", b, err)
	}
}
