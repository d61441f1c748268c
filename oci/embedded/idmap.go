package embedded

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// maxRanges is how many ranges the kernel takes for one user namespace (since 4.15).
const maxRanges = 340

// idMaps translate the ids of a user namespace to those of the runtime's own.
// Without ranges they change nothing.
type idMaps struct {
	uids, gids []specs.LinuxIDMapping
}

func (m idMaps) empty() bool { return len(m.uids) == 0 && len(m.gids) == 0 }

// uid and gid return the host's id, false when the container's has none.
func (m idMaps) uid(id uint32) (uint32, bool) { return mapped(m.uids, id, m.empty()) }
func (m idMaps) gid(id uint32) (uint32, bool) { return mapped(m.gids, id, m.empty()) }

func mapped(ranges []specs.LinuxIDMapping, id uint32, same bool) (uint32, bool) {
	if same {
		return id, true
	}
	for _, r := range ranges {
		if id >= r.ContainerID && uint64(id) < uint64(r.ContainerID)+uint64(r.Size) {
			return r.HostID + (id - r.ContainerID), true
		}
	}
	return 0, false
}

// checkRanges checks what the kernel would refuse with a bare EINVAL.
func checkRanges(field string, ranges []specs.LinuxIDMapping) error {
	if len(ranges) == 0 {
		return invalid("%s: missing; a new user namespace needs at least one range", field)
	}
	if len(ranges) > maxRanges {
		return invalid("%s: %d ranges, the kernel takes %d", field, len(ranges), maxRanges)
	}
	for i, r := range ranges {
		if r.Size == 0 {
			return invalid("%s[%d].size: 0", field, i)
		}
		if uint64(r.ContainerID)+uint64(r.Size) > 1<<32-1 || uint64(r.HostID)+uint64(r.Size) > 1<<32-1 {
			return invalid("%s[%d]: goes beyond the last id, 4294967294", field, i)
		}
		for k, o := range ranges[:i] {
			if overlap(r.ContainerID, r.Size, o.ContainerID, o.Size) || overlap(r.HostID, r.Size, o.HostID, o.Size) {
				return invalid("%s[%d]: overlaps %s[%d]", field, i, field, k)
			}
		}
	}
	return nil
}

func overlap(a, an, b, bn uint32) bool {
	return uint64(a) < uint64(b)+uint64(bn) && uint64(b) < uint64(a)+uint64(an)
}

// rangesText is a mapping as /proc/<pid>/uid_map takes and shows it.
func rangesText(ranges []specs.LinuxIDMapping) []byte {
	var b bytes.Buffer
	for _, r := range ranges {
		fmt.Fprintf(&b, "%d %d %d\n", r.ContainerID, r.HostID, r.Size)
	}
	return b.Bytes()
}

// parseRanges reads /proc/<pid>/uid_map.
func parseRanges(b []byte) ([]specs.LinuxIDMapping, error) {
	var out []specs.LinuxIDMapping
	for line := range strings.Lines(string(b)) {
		var r specs.LinuxIDMapping
		if _, err := fmt.Sscan(line, &r.ContainerID, &r.HostID, &r.Size); err != nil {
			return nil, fmt.Errorf("id mapping %q: %w", line, err)
		}
		out = append(out, r)
	}
	return out, nil
}

// sameRanges compares two mappings without regard to their order.
func sameRanges(a, b []specs.LinuxIDMapping) bool {
	key := func(x, y specs.LinuxIDMapping) int { return int(int64(x.ContainerID) - int64(y.ContainerID)) }
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, key)
	slices.SortFunc(b, key)
	return slices.Equal(a, b)
}
