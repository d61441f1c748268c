package crash

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// lease is a CNI plugin that gives a lease per pod, a file named after it, as
// IPAM plugins do. A pod that has one already is an error, as it is theirs.
const lease = `#!/bin/sh
lease=LEASES/$CNI_CONTAINERID.$(basename $0)
case $CNI_COMMAND in
VERSION)
	echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}' ;;
ADD)
	cat >/dev/null
	if ! (set -C; : >$lease) 2>/dev/null; then
		echo '{"cniVersion":"1.1.0","code":100,"msg":"has a lease already"}'
		exit 1
	fi
	echo '{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"192.0.2.9/24","interface":0}]}' ;;
DEL)
	cat >/dev/null
	rm -f $lease ;;
*)
	cat >/dev/null ;;
esac
`

// usePlugins puts a node's pods on a network of two such plugins.
func usePlugins(t *testing.T, n *node) {
	t.Helper()
	leases := filepath.Join(n.Dir, "leases")
	if err := os.Mkdir(leases, 0o700); err != nil {
		t.Fatal(err)
	}
	script := []byte(strings.ReplaceAll(lease, "LEASES", leases))
	for file, text := range map[string][]byte{
		"cni-bin/lease-one":     script,
		"cni-bin/lease-two":     script,
		"net.d/10-two.conflist": []byte(`{"cniVersion":"1.1.0","name":"two","plugins":[{"type":"lease-one"},{"type":"lease-two"}]}`),
	} {
		if err := os.WriteFile(filepath.Join(n.Dir, file), text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTheDaemonDiesWhileAPluginWorks kills the daemon in the middle of an ADD. The
// next one's DEL must not be overtaken by what is left of it.
func TestTheDaemonDiesWhileAPluginWorks(t *testing.T) {
	n := newNode(t, func(n *node) { usePlugins(t, n) })
	k := kind{name: "slow plugin", stages: []stage{runPod, removePod}}
	learn(t, n, k, n.daemonDies(0))
	before := n.standing(t)
	slow := filepath.Join(n.Dir, "cni-bin", "lease-two")
	script, err := os.ReadFile(slow)
	if err != nil {
		t.Fatal(err)
	}
	// Its lease comes half a second late, and the first one's is there already.
	late := strings.Replace(string(script), "ADD)\n", "ADD)\n\tsleep 0.5\n", 1)
	if err := os.WriteFile(slow, []byte(late), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		l, err := newLife(n, k)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- l.insist(runPod) }()
		time.Sleep(time.Duration(50+rand.IntN(400)) * time.Millisecond)
		if err := n.Kill(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		n.start(t)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := l.insist(removePod); err != nil {
			t.Error(err)
		}
		time.Sleep(600 * time.Millisecond) // what the killed daemon's plugin was about to do
		if err := n.nothingBeyond(before); err != nil {
			t.Fatal(err)
		}
	}
}
