package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// sysctlName: dotted or slashed names without empty or ".." elements.
var sysctlName = regexp.MustCompile(`^[a-z0-9_-]+([./][A-Za-z0-9_:@-]+)+$`)

// networkDefaults are set in every pod network of its own: both let programs
// without privileges do what they may do in a namespace that is theirs alone.
var networkDefaults = map[string]string{
	"net/ipv4/ip_unprivileged_port_start": "0",
	pingRange:                             "0 2147483647",
}

// sysctlsOf returns the pod's sysctls by path below /proc/sys. Only those of a
// namespace that belongs to the pod are accepted: any other would change the node.
func sysctlsOf(c *PodConfig) (map[string]string, error) {
	out := map[string]string{}
	ownNet, ownIPC := c.Namespaces.Network != NamespaceNode, c.Namespaces.IPC != NamespaceNode
	if ownNet {
		maps.Copy(out, networkDefaults)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Sysctls)) {
		refuse := func(why string) error {
			return fmt.Errorf("linux.sysctls[%q]: sysctl %s: %w", name, why, errdefs.ErrInvalidArgument)
		}
		if !sysctlName.MatchString(name) {
			return nil, refuse("has a malformed name")
		}
		// "net/ipv4/..." is the path itself; in the dotted form a slash stands for a
		// dot inside an element (interface names), as sysctl(8) has it.
		key := name
		if dot, slash := strings.IndexByte(name, '.'), strings.IndexByte(name, '/'); slash < 0 || (dot >= 0 && dot < slash) {
			key = strings.NewReplacer(".", "/", "/", ".").Replace(name)
		}
		switch {
		case strings.HasPrefix(key, "net/"):
			if !ownNet {
				return nil, refuse("belongs to the network namespace, and this pod uses the node's")
			}
		case strings.HasPrefix(key, "kernel/shm"), strings.HasPrefix(key, "kernel/msg"), key == "kernel/sem", strings.HasPrefix(key, "fs/mqueue/"):
			if !ownIPC {
				return nil, refuse("belongs to the IPC namespace, and this pod uses the node's")
			}
		default:
			return nil, refuse("is the whole node's; only net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.* belong to a pod")
		}
		out[key] = c.Sysctls[name]
	}
	if u := c.Namespaces.User; u != nil && out[pingRange] != "" {
		var err error
		if out[pingRange], err = hostPingRange(out[pingRange], u.GIDs); err != nil {
			return nil, fmt.Errorf("linux.sysctls[net.ipv4.ping_group_range]: %w", err)
		}
	}
	return out, nil
}

// writeSysctls writes the values in the namespaces of the calling thread.
func writeSysctls(values map[string]string) error {
	if len(values) == 0 {
		return nil
	}
	root, err := os.OpenRoot("/proc/sys")
	if err != nil {
		return err
	}
	defer root.Close()
	for _, key := range slices.Sorted(maps.Keys(values)) {
		f, err := root.OpenFile(key, os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) && networkDefaults[key] != "" {
			continue // a kernel without IPv4 has no such default to set
		}
		if err == nil {
			_, err = f.WriteString(values[key])
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("sysctl %s = %q: %w", strings.ReplaceAll(key, "/", "."), values[key], err)
		}
	}
	return nil
}
