package crash

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
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
