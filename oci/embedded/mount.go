package embedded

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// mount is a checked mount of a spec.
type mount struct {
	field     string
	dest      string // clean, absolute
	fstype    string // "bind" for binds
	source    string
	recursive bool // rbind
	remount   bool // change what is mounted there
	copyUp    bool // a tmpfs starts with what lies below it
	idmap     bool // with maps, or those of the container's user namespace
	ridmap    bool // idmap, for the whole tree
	maps      idMaps
	attr      unix.MountAttr
	rattr     unix.MountAttr // for the whole tree
	opts      []kernel.FSOption
}

// A flag sets or clears mount attributes.
type attrFlag struct{ set, clear uint64 }

var attrFlags = map[string]attrFlag{
	"ro": {unix.MOUNT_ATTR_RDONLY, 0}, "rw": {0, unix.MOUNT_ATTR_RDONLY},
	"nosuid": {unix.MOUNT_ATTR_NOSUID, 0}, "suid": {0, unix.MOUNT_ATTR_NOSUID},
	"nodev": {unix.MOUNT_ATTR_NODEV, 0}, "dev": {0, unix.MOUNT_ATTR_NODEV},
	"noexec": {unix.MOUNT_ATTR_NOEXEC, 0}, "exec": {0, unix.MOUNT_ATTR_NOEXEC},
	"nodiratime": {unix.MOUNT_ATTR_NODIRATIME, 0}, "diratime": {0, unix.MOUNT_ATTR_NODIRATIME},
	"nosymfollow": {unix.MOUNT_ATTR_NOSYMFOLLOW, 0}, "symfollow": {0, unix.MOUNT_ATTR_NOSYMFOLLOW},
	"noatime":     {unix.MOUNT_ATTR_NOATIME, unix.MOUNT_ATTR__ATIME},
	"strictatime": {unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME},
	"relatime":    {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
	"atime":       {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
	// The opposite of an atime mode is the kernel's default.
	"norelatime": {unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME}, "nostrictatime": {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
}

var propagations = map[string]uint64{
	"shared": unix.MS_SHARED, "slave": unix.MS_SLAVE, "private": unix.MS_PRIVATE, "unbindable": unix.MS_UNBINDABLE,
}

// superFlags are options of a filesystem that have no value.
var superFlags = []string{"sync", "dirsync", "lazytime", "silent", "iversion"}

// superOff are the opposites of super flags, which are off in a new filesystem,
// and names of older kernels' options that mean nothing to newer ones.
var superOff = []string{"async", "nolazytime", "nomand", "mand", "loud", "noiversion"}

func parseMount(field string, m specs.Mount) (mount, error) {
	out := mount{field: field, fstype: m.Type, source: m.Source}
	// A relative destination is deprecated and starts at "/" (runtime-spec, "Mounts").
	if out.dest = path.Join("/", m.Destination); out.dest == "/" || strings.ContainsRune(m.Destination, 0) {
		return out, invalid("%s.destination %q: want a path other than \"/\"", field, m.Destination)
	}
	for _, o := range m.Options {
		if err := out.option(o); err != nil {
			return out, err
		}
	}
	if out.rattr.Propagation == 0 {
		out.rattr.Propagation = unix.MS_PRIVATE
	}
	if err := out.idMapping(m); err != nil {
		return out, err
	}
	if out.copyUp && out.fstype != "tmpfs" {
		return out, invalid("%s.options: tmpcopyup is for tmpfs alone", field)
	}
	if out.remount {
		return out, nil
	}
	if out.fstype == "" || out.fstype == "none" {
		return out, invalid("%s.type: missing", field)
	}
	if out.fstype == "bind" && out.source == "" {
		return out, invalid("%s.source: missing", field)
	}
	if out.fstype == "bind" && len(out.opts) > 0 {
		// A bind has no filesystem options: containerd and the kubelet pass none.
		return out, invalid("%s.options: %q does not apply to a bind mount", field, out.opts[0].Key)
	}
	return out, nil
}

// idMapping checks the mapping of an idmapped mount.
func (m *mount) idMapping(spec specs.Mount) error {
	m.maps = idMaps{spec.UIDMappings, spec.GIDMappings}
	if !m.maps.empty() {
		m.idmap = true
		if err := checkRanges(m.field+".uidMappings", spec.UIDMappings); err != nil {
			return err
		}
		if err := checkRanges(m.field+".gidMappings", spec.GIDMappings); err != nil {
			return err
		}
	}
	if m.idmap && m.fstype != "bind" {
		return invalid("%s: an idmapped mount is a bind mount; its type is %q", m.field, m.fstype)
	}
	return nil
}

func (m *mount) option(o string) error {
	name, value, hasValue := strings.Cut(o, "=")
	base, rec := strings.TrimPrefix(name, "r"), strings.HasPrefix(name, "r")
	switch {
	case o == "" || o == "defaults":
	case o == "bind", o == "rbind":
		m.fstype, m.recursive = "bind", o == "rbind"
	case o == "remount":
		m.remount = true
	case o == "tmpcopyup":
		m.copyUp = true
	case o == "idmap", o == "ridmap":
		m.idmap, m.ridmap = true, o == "ridmap"
	case !hasValue && slices.Contains(superOff, o):
	case !hasValue && slices.Contains(superFlags, o):
		m.opts = append(m.opts, kernel.FSOption{Key: o, Flag: true})
	case !hasValue && attrFlags[name] != attrFlag{}:
		apply(&m.attr, attrFlags[name])
	case !hasValue && rec && attrFlags[base] != attrFlag{}:
		apply(&m.rattr, attrFlags[base])
	// Below an rbind a peer group must not stay by omission, so "slave" is "rslave".
	case !hasValue && propagations[name] != 0:
		m.rattr.Propagation = propagations[name]
	case !hasValue && rec && propagations[base] != 0:
		m.rattr.Propagation = propagations[base]
	case hasValue:
		m.opts = append(m.opts, kernel.FSOption{Key: name, Value: value})
	default:
		m.opts = append(m.opts, kernel.FSOption{Key: name, Flag: true})
	}
	return nil
}

// apply lets the later of two contradicting options win.
func apply(a *unix.MountAttr, f attrFlag) {
	a.Attr_set = a.Attr_set&^f.clear | f.set
	if f.set&unix.MOUNT_ATTR__ATIME != 0 || f.clear == unix.MOUNT_ATTR__ATIME {
		a.Attr_clr |= unix.MOUNT_ATTR__ATIME
		return
	}
	a.Attr_clr = a.Attr_clr&^f.set | f.clear
}

// setAttrs puts the attributes of a bind on its tree.
func (m *mount) setAttrs(t *os.File) error {
	for _, x := range []struct {
		attr unix.MountAttr
		rec  bool
	}{{m.rattr, true}, {m.attr, false}} {
		if x.attr == (unix.MountAttr{}) {
			continue
		}
		if err := kernel.SetMountAttr(t, x.rec, &x.attr); err != nil {
			return err
		}
	}
	return nil
}

// remountAt changes what is mounted at the open mount point: its flags, and with
// options of the filesystem the filesystem itself.
func (m *mount) remountAt(at *os.File) error {
	if err := m.setAttrs(at); err != nil { // EINVAL: nothing is mounted there
		return fmt.Errorf("%s.options: remount: %w", m.field, err)
	}
	if m.fstype == "bind" || len(m.opts) == 0 {
		return nil
	}
	if err := kernel.Reconfigure(at, m.opts); err != nil {
		return fmt.Errorf("%s.options: remount: %w", m.field, err)
	}
	return nil
}

// hostIDs are the options of a filesystem with ids translated to the host's:
// the filesystem is made by us, outside of the container's user namespace.
func (m *mount) hostIDs(maps idMaps) ([]kernel.FSOption, error) {
	out := slices.Clone(m.opts)
	if maps.empty() {
		return out, nil
	}
	for i, o := range out {
		to := maps.uid
		switch o.Key {
		case "uid":
		case "gid":
			to = maps.gid
		default:
			continue
		}
		n, err := strconv.ParseUint(o.Value, 10, 32)
		if err != nil {
			return nil, invalid("%s.options: %s=%q: want a number", m.field, o.Key, o.Value)
		}
		id, ok := to(uint32(n))
		if !ok {
			return nil, invalid("%s.options: %s=%s is not in the mappings of the user namespace", m.field, o.Key, o.Value)
		}
		out[i].Value = strconv.FormatUint(uint64(id), 10)
	}
	return out, nil
}

// Prefixes of bind sources that are no paths: a passed descriptor, an image.
const (
	fdSource    = "fd:"
	imageSource = "image:"
)

// procBinds are the only paths below /proc that a mount may cover: what virtual
// procfs filesystems replace. Anything else would let the spec's author fake
// what the runtime itself relies on (CVE-2019-19921, CVE-2025-52881).
var procBinds = []string{
	"cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo",
	"sys/kernel/ns_last_pid", "sys/crypto/fips_enabled",
}
