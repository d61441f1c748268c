package identity

import (
	"bytes"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	maxLine   = 1 << 20 // bytes of one line
	maxGroups = 1 << 16 // NGROUPS_MAX
)

// account is a line of /etc/passwd.
type account struct {
	name     string
	uid, gid uint32
	home     string
}

// findAccount returns the first line of passwd that is u's. Lines that cannot
// be read are no accounts, except the one of a user asked for by name: an
// unreadable id there is an error, not "no such user".
func findAccount(passwd []byte, u user) (account, bool, error) {
	var got account
	found := false
	err := eachLine(passwd, "/etc/passwd", func(f [][]byte) (bool, error) {
		if len(f) < 4 || len(f[0]) == 0 {
			return true, nil
		}
		name := string(f[0])
		uid, uidErr := parseID(f[2])
		gid, gidErr := parseID(f[3])
		if u.name != "" {
			if name != u.name {
				return true, nil
			}
			if uidErr != nil || gidErr != nil {
				return false, fmt.Errorf("user %q: its line in the image's /etc/passwd has an id out of range: %w", name, errdefs.ErrInvalidArgument)
			}
		} else if uidErr != nil || gidErr != nil || uid != u.id {
			return true, nil
		}
		got, found = account{name: name, uid: uid, gid: gid, home: "/"}, true
		if len(f) > 5 {
			got.home = cleanHome(string(f[5]))
		}
		return false, nil
	})
	return got, found, err
}

// cleanHome keeps an absolute path without control bytes; HOME goes into an environment.
func cleanHome(h string) string {
	if !strings.HasPrefix(h, "/") || strings.ContainsFunc(h, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "/"
	}
	return path.Clean(h)
}

// findGroup returns the id of the group called name.
func findGroup(group []byte, name string) (gid uint32, found bool, err error) {
	err = eachLine(group, "/etc/group", func(f [][]byte) (bool, error) {
		if len(f) < 3 || string(f[0]) != name {
			return true, nil
		}
		id, err := parseID(f[2])
		if err != nil {
			return false, fmt.Errorf("group %q: its line in the image's /etc/group has an id out of range: %w", name, errdefs.ErrInvalidArgument)
		}
		gid, found = id, true
		return false, nil
	})
	return gid, found, err
}

// memberships returns the ids of the groups that list name as a member.
func memberships(group []byte, name string) ([]uint32, error) {
	seen := map[uint32]struct{}{}
	var out []uint32
	err := eachLine(group, "/etc/group", func(f [][]byte) (bool, error) {
		if len(f) < 4 || !member(f[3], name) {
			return true, nil
		}
		id, err := parseID(f[2])
		if err != nil {
			return true, nil
		}
		if _, dup := seen[id]; !dup {
			seen[id] = struct{}{}
			out = append(out, id)
		}
		if len(out) > maxGroups {
			return false, fmt.Errorf("user %q: in more than %d groups of the image's /etc/group: %w", name, maxGroups, errdefs.ErrInvalidArgument)
		}
		return true, nil
	})
	return out, err
}

func member(list []byte, name string) bool {
	for m := range bytes.SplitSeq(list, []byte(",")) {
		if string(bytes.TrimSpace(m)) == name {
			return true
		}
	}
	return false
}

// eachLine calls visit with the colon-separated fields of each line until it
// returns false or an error. Comments and empty lines are skipped.
func eachLine(text []byte, file string, visit func(fields [][]byte) (bool, error)) error {
	for line := range bytes.Lines(text) {
		if len(line) > maxLine {
			return fmt.Errorf("image %s: a line is longer than %d bytes: %w", file, maxLine, errdefs.ErrInvalidArgument)
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		// Eight parts: a passwd line has seven fields, more colons are of no interest.
		again, err := visit(bytes.SplitN(line, []byte(":"), 8))
		if err != nil || !again {
			return err
		}
	}
	return nil
}

func parseID(b []byte) (uint32, error) {
	s := string(b)
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, strconv.ErrSyntax
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > maxID {
		return 0, strconv.ErrRange
	}
	return uint32(n), nil
}
