package embedded

import (
	"maps"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// sysctl is one value below /proc/sys.
type sysctl struct{ key, path, value string }

// ipcSysctls are per IPC namespace.
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall",
	"kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

// checkSysctls lets through only what belongs to a namespace that the container
// does not share with the host (invariant I12).
func (p *plan) checkSysctls(in map[string]string) ([]sysctl, error) {
	var out []sysctl
	for _, k := range slices.Sorted(maps.Keys(in)) {
		// "net/ipv4/conf/eth0.1/x" is the form for names with dots.
		file := k
		if i := strings.IndexAny(k, "./"); i >= 0 && k[i] == '.' {
			file = strings.Map(func(c rune) rune {
				switch c {
				case '.':
					return '/'
				case '/':
					return '.'
				}
				return c
			}, k)
		}
		dotted := strings.ReplaceAll(file, "/", ".")
		if path.Clean(file) != file || strings.HasPrefix(file, "/") || strings.HasPrefix(file, "..") || strings.ContainsAny(k, "\x00\n") {
			return nil, invalid("linux.sysctl %q: not a name below /proc/sys", k)
		}
		var kind specs.LinuxNamespaceType
		switch {
		case strings.HasPrefix(file, "net/"):
			kind = specs.NetworkNamespace
		case slices.Contains(ipcSysctls, dotted), strings.HasPrefix(file, "fs/mqueue/"):
			kind = specs.IPCNamespace
		case file == "kernel/hostname", file == "kernel/domainname":
			kind = specs.UTSNamespace
		default:
			return nil, invalid("linux.sysctl %q: not in a namespace; it would change the host", k)
		}
		if p.ns[kind].mode == nsHost {
			return nil, invalid("linux.sysctl %q: needs a %s namespace that is not the host's", k, kind)
		}
		out = append(out, sysctl{k, file, in[k]})
	}
	return out, nil
}
