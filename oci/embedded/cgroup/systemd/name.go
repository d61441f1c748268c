package systemd

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// name is a parsed linux.cgroupsPath.
type name struct {
	slice     string // "kubepods-burstable.slice"
	slicePath string // "/kubepods.slice/kubepods-burstable.slice"
	scope     string // "cri-0123.scope"
}

// parseName reads "slice:prefix:name". An empty slice is system.slice, or
// user.slice of a user; the unit is "prefix-name.scope", also where the prefix is
// empty.
func parseName(cgroupsPath string, user bool) (name, error) {
	bad := func(format string, args ...any) (name, error) {
		return name{}, fmt.Errorf("linux.cgroupsPath %q: %s: %w", cgroupsPath, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	parts := strings.Split(cgroupsPath, ":")
	if len(parts) != 3 {
		return bad("want \"slice:prefix:name\", as cgroups are made by systemd")
	}
	n := name{slice: parts[0]}
	if n.slice == "" {
		n.slice = "system.slice"
		if user {
			n.slice = "user.slice"
		}
	}
	var err error
	if n.slicePath, err = expandSlice(n.slice); err != nil {
		return bad("%v", err)
	}
	switch {
	case parts[2] == "":
		return bad("want a name in \"slice:prefix:name\"")
	case strings.HasSuffix(parts[2], ".slice"):
		return bad("a slice holds no processes: want a name that does not end in .slice")
	}
	n.scope = parts[1] + "-" + parts[2] + ".scope"
	if err := checkUnitName(n.scope); err != nil {
		return bad("%v", err)
	}
	return n, nil
}

// expandSlice returns the path of a slice: a dash in its name is a level of the
// tree. "-.slice" is the root.
func expandSlice(slice string) (string, error) {
	base, ok := strings.CutSuffix(slice, ".slice")
	if err := checkUnitName(slice); err != nil {
		return "", err
	}
	if !ok || base == "" {
		return "", fmt.Errorf("slice %q: want a name that ends in .slice", slice)
	}
	if base == "-" {
		return "/", nil
	}
	out, prefix := "", ""
	for part := range strings.SplitSeq(base, "-") {
		if part == "" {
			return "", fmt.Errorf("slice %q: want no dash at its ends and no two in a row", slice)
		}
		out += "/" + prefix + part + ".slice"
		prefix += part + "-"
	}
	return out, nil
}

// checkUnitName holds a unit name to what systemd takes: above all no "/".
func checkUnitName(s string) error {
	if len(s) > 255 {
		return fmt.Errorf("unit name of %d characters: want at most 255", len(s))
	}
	for _, c := range s {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune(`:-_.\@`, c) {
			continue
		}
		return fmt.Errorf("unit name %q: character %q", s, c)
	}
	return nil
}
