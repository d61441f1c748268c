package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// plugin is a CNI plugin that gives each pod an address from files in $dir, as
// host-local does, and does wrong what $dir/<pod name>.<verb> says.
const plugin = `#!/bin/bash
dir=%q
cat >/dev/null
name=${CNI_ARGS#*K8S_POD_NAME=}; name=${name%%%%;*}
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'; exit;;
esac
echo "$CNI_COMMAND $name" >>"$dir/calls"
if [ $CNI_COMMAND = DEL ]; then
  fault=$dir/$name.DEL
  if [ -e "$fault" ]; then
    left=$(<"$fault")
    if [ "$left" -gt 0 ]; then
      echo $((left-1)) >"$fault"
      echo '{"cniVersion":"1.0.0","code":11,"msg":"address server does not answer"}'
      exit 1
    fi
  fi
  grep -lx "$CNI_CONTAINERID" "$dir"/ip.* 2>/dev/null | xargs -r rm
  exit 0
fi
[ $CNI_COMMAND = ADD ] || exit 0
i=2
until (set -o noclobber; echo "$CNI_CONTAINERID" >"$dir/ip.$i") 2>/dev/null; do i=$((i+1)); done
fault=$dir/$name.ADD
[ -e "$fault" ] && . "$fault"
echo "{\"cniVersion\":\"1.0.0\",\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"$CNI_NETNS\"}],\"ips\":[{\"address\":\"10.9.0.$i/24\",\"interface\":0}]}"
`

const pluginTimeout = 2 * time.Second

// plugged is a node whose pods are attached by the plugin, and the plugin's folder.
func plugged(t *testing.T) (*node, string) {
	t.Helper()
	n := fresh(t)
	dir := t.TempDir()
	write(t, filepath.Join(n.Dir, "cni-bin", "faulty"), fmt.Sprintf(plugin, dir))
	if err := os.Chmod(filepath.Join(n.Dir, "cni-bin", "faulty"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(n.Dir, "net.d", "10-faulty.conflist"), `{"cniVersion":"1.0.0","name":"faulty","plugins":[{"type":"faulty"}]}`)
	if err := n.Config(fmt.Sprintf("[network]\nplugin_timeout = %q\n", pluginTimeout)); err != nil {
		t.Fatal(err)
	}
	n.up()
	n.pull(prog)
	return n, dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// addresses lists what the plugin has given out and not taken back.
func addresses(t *testing.T, dir string) []string {
	t.Helper()
	out, err := filepath.Glob(filepath.Join(dir, "ip.*"))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// nothingOf checks that of a pod that could not be made nothing is left.
func nothingOf(n *node, dir string) {
	n.t.Helper()
	if a := addresses(n.t, dir); len(a) > 0 {
		n.t.Errorf("addresses leaked: %v", a)
	}
	if p := n.pods(); len(p) > 0 {
		n.t.Errorf("pods left: %v", p)
	}
	for _, sub := range []string{"run/cni/netns", "run/cni/attachments", "run/pods", "root/sandboxes/pods"} {
		if left := files(n.t, filepath.Join(n.Dir, sub)); len(left) > 0 {
			n.t.Errorf("%s: left %v", sub, left)
		}
	}
}

// TestCNIPluginHangs: the plugin ignores SIGTERM and has forked. It is killed
// with its children at our own deadline, its pod is taken back, and the other
// pods do not notice.
func TestCNIPluginHangs(t *testing.T) {
	n, dir := plugged(t)
	c := n.PodConfig()
	write(t, filepath.Join(dir, c.Metadata.Name+".ADD"), `
trap '' TERM INT HUP
sleep 300 & echo $! >"$dir/child"
(trap '' TERM; sleep 300) & echo $! >>"$dir/child"
while :; do sleep 300; done`)
	done := make(chan error, 1)
	began := time.Now()
	go func() {
		_, err := n.tryPod(c)
		done <- err
	}()
	n.eventually("the plugin hangs", func() bool {
		b, _ := os.ReadFile(filepath.Join(dir, "child"))
		return strings.Count(string(b), "\n") == 2
	})
	p := n.pod()
	n.alive(n.run(p, "sleep", "1000"))
	n.ready()
	if took := time.Since(began); took > pluginTimeout {
		t.Logf("a neighbour took until %v after the plugin hung", took)
	}
	n.removePod(p.id)
	err := <-done
	wantErr(t, "run pod", err, "faulty ADD", "killed", "no answer within 2s")
	if took := time.Since(began); took > pluginTimeout+10*time.Second {
		t.Errorf("took %v, the deadline is %v", took, pluginTimeout)
	}
	nothingOf(n, dir)
	b, err := os.ReadFile(filepath.Join(dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(line)
		if err != nil {
			t.Fatal(err)
		}
		n.eventually("the plugin's child is killed", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err != nil || strings.Contains(string(stat), ") Z ") || unix.Kill(pid, 0) != nil
		})
	}
	if err := os.Remove(filepath.Join(dir, c.Metadata.Name+".ADD")); err != nil {
		t.Fatal(err)
	}
	id, err := n.tryPod(c)
	if err != nil {
		t.Fatalf("retry with a well plugin: %v", err)
	}
	n.removePod(id)
	nothingOf(n, dir)
}

// TestCNIPluginGarbage: whatever a plugin prints, the pod's error says what, the
// daemon's memory stays bounded, and the address is given back.
func TestCNIPluginGarbage(t *testing.T) {
	n, dir := plugged(t)
	for name, tc := range map[string]struct {
		script string
		want   []string
	}{
		"nothing":       {`exit 0`, []string{"faulty ADD", "result is not a JSON object"}},
		"half":          {`echo '{'; exit 0`, []string{"faulty ADD", "result is not a JSON object", "{"}},
		"100 MiB":       {`head -c 104857600 /dev/zero | tr '\0' x; exit 0`, []string{"faulty ADD", "output is larger than 1048576 bytes", "xxxxxx"}},
		"100 MiB error": {`head -c 104857600 /dev/zero | tr '\0' x >&2; exit 3`, []string{"faulty ADD", "exit status 3", "xxxxxx"}},
		"wrong version": {`echo '{"cniVersion":"7.7.7","ips":[{"address":"10.9.0.7/24"}]}'; exit 0`, []string{"faulty ADD", "7.7.7", "10.9.0.7"}},
		"error, exit 0": {`echo '{"cniVersion":"1.0.0","code":999,"msg":"bridge is gone"}'; exit 0`, []string{"faulty ADD", "code 999", "bridge is gone"}},
		"text, exit 1":  {`echo 'panic: out of cheese'; exit 1`, []string{"faulty ADD", "exit status 1", "panic: out of cheese"}},
		"fails":         {`echo '{"cniVersion":"1.0.0","code":11,"msg":"try again later"}'; exit 1`, []string{"faulty ADD", "code 11", "try again later"}},
		"killed":        {`kill -9 $$`, []string{"faulty ADD", "signal: killed"}},
	} {
		c := n.PodConfig()
		write(t, filepath.Join(dir, c.Metadata.Name+".ADD"), tc.script)
		before := rss(t, n.Pid())
		_, err := n.tryPod(c)
		wantErr(t, name, err, tc.want...)
		if grown := rss(t, n.Pid()) - before; grown > 32<<20 {
			t.Errorf("%s: the daemon grew by %d MiB", name, grown>>20)
		}
		nothingOf(n, dir)
		n.ready()
	}
	n.removePod(n.pod().id)
}

// rss is what the process holds in memory, in bytes.
func rss(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// TestCNIDelFailsThenWorks: a pod whose plugin cannot detach it stays listed,
// each stop says why, and the first one that can is the last. A restart of the
// daemon in between changes nothing.
func TestCNIDelFailsThenWorks(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			n, dir := plugged(t)
			p := n.pod()
			c := n.run(p, "sleep", "1000")
			write(t, filepath.Join(dir, p.config.Metadata.Name+".DEL"), "3")
			for i := range 3 {
				err := n.tryStopPod(p.id)
				wantErr(t, fmt.Sprintf("stop %d", i+1), err, "faulty DEL", "code 11", "address server does not answer")
				if s, ok := n.pods()[p.id]; !ok || s != cri.PodSandboxState_SANDBOX_NOTREADY {
					t.Fatalf("after stop %d: pod is %v, listed %v", i+1, s, ok)
				}
				if s := n.container(c); s.State != cri.ContainerState_CONTAINER_EXITED {
					t.Errorf("after stop %d: container is %v", i+1, s.State)
				}
				n.ready()
				if restart {
					n.restart()
				}
			}
			if err := n.tryStopPod(p.id); err != nil {
				t.Errorf("stop 4: %v", err)
			}
			if err := n.tryRemovePod(p.id); err != nil {
				t.Errorf("remove: %v", err)
			}
			nothingOf(n, dir)
		})
	}
}

// TestCNIDelFailsInRemove: the removal of a pod that cannot be detached is an
// error, never a leaked address; and so is the rollback of one that was not made.
func TestCNIDelFailsInRemove(t *testing.T) {
	n, dir := plugged(t)
	p := n.pod()
	write(t, filepath.Join(dir, p.config.Metadata.Name+".DEL"), "1")
	wantErr(t, "remove", n.tryRemovePod(p.id), "faulty DEL", "address server does not answer")
	if _, ok := n.pods()[p.id]; !ok {
		t.Error("the pod is not listed any more")
	}
	if err := n.tryRemovePod(p.id); err != nil {
		t.Errorf("second remove: %v", err)
	}
	nothingOf(n, dir)

	c := n.PodConfig()
	write(t, filepath.Join(dir, c.Metadata.Name+".ADD"), "exit 1")
	write(t, filepath.Join(dir, c.Metadata.Name+".DEL"), "2") // that of Attach and that of the rollback
	_, err := n.tryPod(c)
	wantErr(t, "run pod", err, "faulty ADD", "faulty DEL")
	if len(n.pods()) != 1 || len(addresses(t, dir)) != 1 {
		t.Errorf("pods %v, addresses %v: want the pod listed for as long as it has its address", n.pods(), addresses(t, dir))
	}
	for id := range n.pods() {
		n.removePod(id)
	}
	nothingOf(n, dir)
}
