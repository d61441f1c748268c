// Package identity resolves the user of a container's first process from the
// request, the image's USER and the image's own /etc/passwd and /etc/group.
//
// Identity is exact (invariant I6): ids are range-checked, a numeric string is
// never looked up as a name, the primary group is always among the groups, and
// the image's files are read in bounds from its layers without following a link
// out of them.
package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/sandbox/model"
)

// maxID is the largest usable uid or gid: 1<<32-1 is (uid_t)-1, which
// setresuid(2) reads as "keep".
const maxID = 1<<32 - 2

// user is how a request or an image names a user: by id, or by name.
type user struct {
	id    uint32
	name  string // "" when named by id
	group string // id or name; "" for the user's own
}

// Resolve returns the identity and home directory of a container's first
// process. layers are the image's layer directories from the top one to the
// bottom one; imageUser is the image config's User.
//
// run_as_user or run_as_username of sec replace the image's user and group;
// a uid without an entry in /etc/passwd has group 0 and home "/", a name
// without one is an error. With StrictGroups only the given supplemental groups
// count, otherwise memberships in /etc/group are added; the primary group comes
// first in both. Errors are errdefs.ErrInvalidArgument and name the field.
func Resolve(layers []string, imageUser string, sec model.Security) (model.Identity, string, error) {
	u, err := wanted(imageUser, sec)
	if err != nil {
		return model.Identity{}, "", err
	}
	v, err := openView(layers)
	if err != nil {
		return model.Identity{}, "", err
	}
	defer v.close()
	accounts, err := readOptional(v, "/etc/passwd")
	if err != nil {
		return model.Identity{}, "", err
	}
	a, found, err := findAccount(accounts, u)
	if err != nil {
		return model.Identity{}, "", err
	}
	if !found && u.name != "" {
		return model.Identity{}, "", fmt.Errorf("user %q: not in the image's /etc/passwd; use a name that is, or a numeric user: %w", u.name, errdefs.ErrInvalidArgument)
	}
	if !found {
		a = account{uid: u.id, home: "/"}
	}
	groups, err := readOptional(v, "/etc/group")
	if err != nil {
		return model.Identity{}, "", err
	}
	ident := model.Identity{UID: a.uid, GID: a.gid}
	if ident.GID, err = primaryGroup(groups, u, sec, a.gid); err != nil {
		return model.Identity{}, "", err
	}
	ident.Groups, err = allGroups(groups, a.name, ident.GID, sec)
	if err != nil {
		return model.Identity{}, "", err
	}
	return ident, a.home, nil
}

func readOptional(v *view, path string) ([]byte, error) {
	b, err := v.readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// wanted says which user the request asks for, else the image's.
func wanted(imageUser string, sec model.Security) (user, error) {
	switch {
	case sec.RunAsUser != nil && sec.RunAsUsername != "":
		return user{}, fmt.Errorf("run_as_user and run_as_username: both are set; give one: %w", errdefs.ErrInvalidArgument)
	case sec.RunAsGroup != nil && sec.RunAsUser == nil && sec.RunAsUsername == "":
		return user{}, fmt.Errorf("run_as_group: set without a user; set run_as_user or run_as_username too: %w", errdefs.ErrInvalidArgument)
	case sec.RunAsUser != nil:
		id, err := checkID("run_as_user", *sec.RunAsUser)
		return user{id: id}, err
	case sec.RunAsUsername != "":
		if numeric(sec.RunAsUsername) {
			return user{}, fmt.Errorf("run_as_username %q: a number; use run_as_user: %w", sec.RunAsUsername, errdefs.ErrInvalidArgument)
		}
		if err := checkName(sec.RunAsUsername); err != nil {
			return user{}, fmt.Errorf("run_as_username: %w", err)
		}
		return user{name: sec.RunAsUsername}, nil
	}
	u, err := parseUser(imageUser)
	if err != nil {
		return user{}, fmt.Errorf("user of the image config: %w; set run_as_user", err)
	}
	return u, nil
}

// parseUser reads the image config's "user[:group]", each an id or a name; an
// empty user is root.
func parseUser(s string) (user, error) {
	name, group, _ := strings.Cut(s, ":")
	u := user{group: group}
	if name != "" {
		id, isID, err := parseIDOrName(name)
		if err != nil {
			return user{}, err
		}
		if u.id = id; !isID {
			u.name = name
		}
	}
	if group != "" {
		if _, _, err := parseIDOrName(group); err != nil {
			return user{}, err
		}
	}
	return u, nil
}

func parseIDOrName(s string) (id uint32, isID bool, err error) {
	if !numeric(s) {
		return 0, false, checkName(s)
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > maxID {
		// Never a fall-back to a name: a passwd line "4294967296:x:0:0" would make it root.
		return 0, false, fmt.Errorf("id %q: not between 0 and %d: %w", s, uint64(maxID), errdefs.ErrInvalidArgument)
	}
	return uint32(n), true, nil
}

// numeric reports whether s is meant as a number: digits, perhaps signed.
func numeric(s string) bool {
	digits := strings.TrimLeft(s, "+-")
	return digits != "" && strings.Trim(digits, "0123456789") == ""
}

func checkName(s string) error {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == 0x7f || c == ':' || c == ',' || c == '/' {
			return fmt.Errorf("name %q: byte %q is not allowed: %w", s, c, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func checkID(field string, id int64) (uint32, error) {
	if id < 0 || id > maxID {
		return 0, fmt.Errorf("%s %d: not between 0 and %d: %w", field, id, uint64(maxID), errdefs.ErrInvalidArgument)
	}
	return uint32(id), nil
}

func primaryGroup(groups []byte, u user, sec model.Security, own uint32) (uint32, error) {
	if sec.RunAsGroup != nil {
		return checkID("run_as_group", *sec.RunAsGroup)
	}
	if u.group == "" {
		return own, nil
	}
	id, isID, err := parseIDOrName(u.group)
	if err != nil || isID {
		return id, err
	}
	id, found, err := findGroup(groups, u.group)
	if err == nil && !found {
		err = fmt.Errorf("group %q of the image config's user: not in the image's /etc/group; set run_as_user and run_as_group: %w", u.group, errdefs.ErrInvalidArgument)
	}
	return id, err
}

// allGroups returns the primary group followed by the others, ascending.
func allGroups(groups []byte, name string, gid uint32, sec model.Security) ([]uint32, error) {
	var more []uint32
	for i, g := range sec.SupplementalGroups {
		id, err := checkID(fmt.Sprintf("supplemental_groups[%d]", i), g)
		if err != nil {
			return nil, err
		}
		more = append(more, id)
	}
	if !sec.StrictGroups && name != "" {
		ids, err := memberships(groups, name)
		if err != nil {
			return nil, err
		}
		more = append(more, ids...)
	}
	slices.Sort(more)
	more = slices.Compact(more)
	out := []uint32{gid}
	for _, g := range more {
		if g != gid {
			out = append(out, g)
		}
	}
	if len(out) > maxGroups {
		return nil, fmt.Errorf("supplemental_groups: %d groups, the kernel takes %d: %w", len(out), maxGroups, errdefs.ErrInvalidArgument)
	}
	return out, nil
}
