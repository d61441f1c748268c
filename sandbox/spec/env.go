package spec

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environ is an ordered set of variables.
type environ struct {
	list  []string
	index map[string]int
}

func (e *environ) set(key, value string) {
	kv := key + "=" + value
	if i, ok := e.index[key]; ok {
		e.list[i] = kv
		return
	}
	e.index[key] = len(e.list)
	e.list = append(e.list, kv)
}

func (e *environ) setDefault(key, value string) {
	if _, ok := e.index[key]; !ok {
		e.set(key, value)
	}
}

// environment merges the image's variables with the request's, which win; a
// later one of the same key wins over an earlier one. Values are raw bytes, not
// always UTF-8. The daemon's own environment is never consulted (invariant I10).
func environment(in Input) ([]string, error) {
	e := environ{index: map[string]int{}}
	for _, kv := range in.Image.Env {
		key, value, ok := strings.Cut(kv, "=")
		if !ok || key == "" || strings.IndexByte(kv, 0) >= 0 {
			continue // a name alone must not become a look-up in some other environment
		}
		e.set(key, value)
	}
	for i, kv := range in.Container.Env {
		if kv.Key == "" || strings.ContainsAny(kv.Key, "=\x00") {
			return nil, fmt.Errorf("envs[%d].key %q: must be non-empty, without '=' and NUL: %w", i, kv.Key, errdefs.ErrInvalidArgument)
		}
		value := string(kv.Value)
		if strings.IndexByte(value, 0) >= 0 {
			return nil, fmt.Errorf("envs[%d] %q: its value holds a NUL byte; remove it: %w", i, kv.Key, errdefs.ErrInvalidArgument)
		}
		e.set(kv.Key, value)
	}
	e.setDefault("PATH", defaultPath)
	if in.Hostname != "" {
		e.setDefault("HOSTNAME", in.Hostname)
	}
	if in.Container.TTY {
		e.setDefault("TERM", "xterm")
	}
	home := in.Home
	if home == "" {
		home = "/"
	}
	e.setDefault("HOME", home)
	return e.list, nil
}
