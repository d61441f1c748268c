package cgroup

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// rule allows or denies access to devices. -1 is any number; kind 'a' any device.
type rule struct {
	allow        bool
	kind         byte // 'a', 'b', 'c'
	major, minor int64
	access       string // of "rwm", in that order
}

// standard devices every container may use: null, zero, full, tty, random,
// urandom, the pty multiplexer and ptys.
var standard = []rule{
	{true, 'c', 1, 3, "rwm"}, {true, 'c', 1, 5, "rwm"}, {true, 'c', 1, 7, "rwm"},
	{true, 'c', 1, 8, "rwm"}, {true, 'c', 1, 9, "rwm"}, {true, 'c', 5, 0, "rwm"},
	{true, 'c', 5, 2, "rwm"}, {true, 'c', 136, -1, "rwm"},
}

// rules compiles linux.resources.devices: everything is denied first, the
// standard devices are always allowed, then the spec's rules act in order. A
// rule for all devices wipes the ones before it.
func rules(in []specs.LinuxDeviceCgroup) ([]rule, error) {
	out := append([]rule{{false, 'a', -1, -1, "rwm"}}, standard...)
	for i, d := range in {
		field := fmt.Sprintf("linux.resources.devices[%d]", i)
		r := rule{allow: d.Allow, major: -1, minor: -1, access: "rwm"}
		switch d.Type {
		case "", "a":
			r.kind = 'a'
		case "b", "c":
			r.kind = d.Type[0]
		default:
			return nil, fmt.Errorf("%s.type %q: want a, b or c: %w", field, d.Type, errdefs.ErrInvalidArgument)
		}
		if d.Major != nil {
			r.major = *d.Major
		}
		if d.Minor != nil {
			r.minor = *d.Minor
		}
		if d.Access != "" {
			r.access = ""
			for _, a := range "rwm" {
				if strings.ContainsRune(d.Access, a) {
					r.access += string(a)
				}
			}
			if len(r.access) != len(d.Access) {
				return nil, fmt.Errorf("%s.access %q: want letters of \"rwm\": %w", field, d.Access, errdefs.ErrInvalidArgument)
			}
		}
		if r.kind == 'a' && (r.major >= 0 || r.minor >= 0 || r.access != "rwm") {
			return nil, fmt.Errorf("%s: a rule for all devices has no numbers and access \"rwm\": %w", field, errdefs.ErrInvalidArgument)
		}
		if r.kind != 'a' {
			out = append(out, r)
			continue
		}
		out = []rule{r}
		if !r.allow {
			out = append(out, standard...)
		}
	}
	return out, nil
}

// v1 is the rule as devices.allow and devices.deny take it.
func (r rule) v1() string {
	if r.kind == 'a' {
		return "a"
	}
	n := func(v int64) string {
		if v < 0 {
			return "*"
		}
		return strconv.FormatInt(v, 10)
	}
	return string(r.kind) + " " + n(r.major) + ":" + n(r.minor) + " " + r.access
}
