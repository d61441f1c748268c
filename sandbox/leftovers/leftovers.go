// Package leftovers finds what is left of pods and containers that are on no
// record: the part that the engine, and no part below it, knows where to look for.
// The running engine and `berth fsck` use it alike.
//
// What is looked for is proved to be Berth's, or only reported. Names are ids,
// which are never used twice, and an object is on record before it is made: so
// what was listed first, and is on no record after that, was forgotten or never
// belonged to anybody. It may still be on its way out; callers look twice
// (leftover.Sightings).
package leftovers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// Records says what is on record. All are asked again and again, also while a
// finding is removed, and answer for that moment.
type Records struct {
	Pod func(id.Pod) bool
	// Container and Containers know the first processes of pods too.
	Container  func(id.Container) bool
	Containers func() map[id.Container]bool
	// Ended reports whether a container is on record as ended. Silence kills what of it
	// runs all the same; nil leaves that to the next daemon.
	Ended   func(id.Container) bool
	Silence func(ctx context.Context, c id.Container) error
	// Keeps reports whether a pod wants a descriptor kept, by the key it is kept under.
	Keeps func(key string) bool
	// Running lists the containers that should be running.
	Running func() []Running
	// Logs lists the log files of the containers.
	Logs func() []string
}

// Running is a container that is on record as running.
type Running struct {
	ID     id.Container
	Pid    int
	Cgroup string
	// Settle brings the record in line with the supervisor's word, nil for none. A
	// nil Settle leaves that to the next daemon.
	Settle func(ctx context.Context, known *wire.Info) error
}

// Supervisor is what of the supervisor is needed.
type Supervisor interface {
	List(ctx context.Context) ([]wire.Info, error)
	Delete(ctx context.Context, c id.Container) error
	ListFDs(ctx context.Context) ([]string, error)
	DropFDs(ctx context.Context, keys []string) error
}

// Places says where to look.
type Places struct {
	// Pods holds a folder per pod, Layers one per container in folders of one digit,
	// Records the files of records, in two folders.
	Pods, Layers, Records string
	// State is the folder of the supervisor too, with the bundles of external runtimes.
	State string
	// Cgroups are the mount points of all cgroup hierarchies, Parent is where the
	// cgroups of pods are that were given none.
	Cgroups []string
	Parent  string
	// Past are the objects whose records were removed.
	Past *Past
	// Supervisor is nil when none runs.
	Supervisor    Supervisor
	SupervisorPid int
	// SkipLogs leaves out the descriptors of the supervisor, a dozen for each container:
	// a look at them costs more than all others.
	SkipLogs bool
}

// look is one look at all places.
type look struct {
	Places
	rec Records
	out []leftover.Finding
}

// Look finds leftovers. The error is of places that could not be looked at; what was
// found elsewhere is returned all the same.
func Look(ctx context.Context, p Places, r Records) ([]leftover.Finding, error) {
	l := &look{Places: p, rec: r}
	err := errors.Join(l.supervised(ctx), l.cgroups(), l.mounts(), l.folders(), l.bundles(), l.logs(), l.aside())
	return l.out, err
}

func (l *look) add(f leftover.Finding) { l.out = append(l.out, f) }

// names lists a folder; one that is not there is empty.
func names(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// supervised compares the records with the supervisor's containers and descriptors.
func (l *look) supervised(ctx context.Context) error {
	running := l.rec.Running() // before the list: one that starts meanwhile is in neither
	if l.Supervisor == nil {
		for _, r := range running {
			if !inCgroup(r.Pid, r.Cgroup) {
				l.add(leftover.Finding{Kind: leftover.Lost, Name: string(r.ID), Detail: fmt.Sprintf("on record as running; process %d is not there, and no supervisor runs", r.Pid),
					Remedy: "start berthd: it reports the container as exited"})
			}
		}
		return nil
	}
	list, err := l.Supervisor.List(ctx)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	known := map[id.Container]*wire.Info{}
	recorded := l.rec.Containers()
	for i := range list {
		c := list[i].ID
		known[c] = &list[i]
		if recorded[c] {
			if list[i].State == wire.Running && l.rec.Ended(c) {
				l.add(l.undead(list[i]))
			}
			continue
		}
		l.add(leftover.Finding{Kind: leftover.Container, Name: string(c), Since: list[i].StartedAt,
			Detail: fmt.Sprintf("%s in the supervisor, and not on record", list[i].State),
			Remove: func(ctx context.Context) error {
				if l.rec.Container(c) {
					return nil
				}
				return l.Supervisor.Delete(ctx, c)
			}})
	}
	for _, r := range running {
		info := known[r.ID]
		if info != nil && (info.State == wire.Running || r.Settle == nil && info.State == wire.Exited) {
			continue // an end that the next daemon reads
		}
		f := leftover.Finding{Kind: leftover.Lost, Name: string(r.ID), Detail: "on record as running, and unknown to the supervisor", Remedy: "start berthd: it reports the container as exited"}
		if info != nil {
			f.Detail = fmt.Sprintf("on record as running, and %s in the supervisor", info.State)
		}
		if r.Settle != nil {
			f.Remedy, f.Remove = "", func(ctx context.Context) error { return r.Settle(ctx, info) }
		}
		l.add(f)
	}
	keys, err := l.Supervisor.ListFDs(ctx)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	for _, key := range keys {
		pod, _, ok := strings.Cut(key, "/")
		if !ok || id.Valid(pod) != nil || l.rec.Keeps(key) {
			continue
		}
		l.add(leftover.Finding{Kind: leftover.Descriptor, Name: key, Detail: "kept by the supervisor for a pod sandbox that does not hold it",
			Remove: func(ctx context.Context) error {
				if l.rec.Keeps(key) {
					return nil
				}
				return l.Supervisor.DropFDs(ctx, []string{key})
			}})
	}
	return nil
}

// undead is a container that runs although it counts as ended.
func (l *look) undead(i wire.Info) leftover.Finding {
	f := leftover.Finding{Kind: leftover.Process, Name: strconv.Itoa(i.Pid), Since: i.StartedAt,
		Detail: fmt.Sprintf("running in the supervisor as container %s, which is on record as ended", i.ID), Remedy: "start berthd: it kills the process"}
	if l.rec.Silence != nil {
		f.Remedy, f.Remove = "", func(ctx context.Context) error {
			if !l.rec.Ended(i.ID) {
				return nil
			}
			return l.rec.Silence(ctx, i.ID)
		}
	}
	return f
}

// mounts looks for mounts of the host in the folders of pods and containers: Berth
// makes none, but a hook or a person may have. What an operator has mounted at the
// folders above is theirs.
func (l *look) mounts() error {
	dirs := resolved(l.Pods, l.Layers, filepath.Join(l.State, "external"))
	found, err := mountsBelow(dirs...)
	if err != nil {
		return err
	}
	for _, at := range found {
		owner := ownerOf(at, dirs)
		if owner == "" {
			continue
		}
		f := leftover.Finding{Kind: leftover.Mount, Name: at, Detail: "in the host's mount table, in the folder of " + owner + ", which is not on record",
			Remove: func(context.Context) error {
				if l.onRecord(owner) {
					return nil
				}
				return unmount(at)
			}}
		if l.onRecord(owner) {
			f.Detail, f.Remedy, f.Remove = "in the host's mount table, in the folder of "+owner, "Berth mounts nothing there: unmount it if nobody uses it", nil
		}
		l.add(f)
	}
	return nil
}

func (l *look) onRecord(name string) bool {
	return l.rec.Pod(id.Pod(name)) || l.rec.Container(id.Container(name))
}

// ownerOf is the first id in a path below one of the folders; those above may be in
// a folder that is named by another program's id.
func ownerOf(path string, dirs []string) string {
	for _, d := range dirs {
		below, ok := strings.CutPrefix(path, d+"/")
		if !ok {
			continue
		}
		for part := range strings.SplitSeq(below, "/") {
			if id.Valid(part) == nil {
				return part
			}
		}
	}
	return ""
}

// resolved are the folders as the mount table names them.
func resolved(dirs ...string) []string {
	for i, d := range dirs {
		if real, err := filepath.EvalSymlinks(d); err == nil {
			dirs[i] = real
		}
	}
	return dirs
}

// mountsBelow lists the mount points below the folders, the innermost first.
func mountsBelow(dirs ...string) (out []string, err error) {
	dirs = resolved(dirs...)
	all, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		for _, d := range dirs {
			if strings.HasPrefix(m.Mountpoint, d+"/") && !strings.HasSuffix(m.Mountpoint, "//deleted") {
				return false, false
			}
		}
		return true, false
	})
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	for i := len(all) - 1; i >= 0; i-- { // later ones cover earlier ones
		out = append(out, all[i].Mountpoint)
	}
	return out, nil
}

// unmount takes off what is mounted at a path, and nothing else.
func unmount(at string) error {
	err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == unix.EINVAL || err == unix.ENOENT { // nothing is mounted there any more
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", at, err)
	}
	return nil
}

// folders looks for folders of pods and writable layers of containers.
func (l *look) folders() error {
	pods, err := names(l.Pods)
	if err != nil {
		return err
	}
	for _, name := range pods {
		if id.Valid(name) == nil && !l.rec.Pod(id.Pod(name)) {
			l.add(l.folder(leftover.PodFiles, filepath.Join(l.Pods, name), "files of a pod sandbox that is not on record"))
		}
	}
	shards, err := names(l.Layers)
	if err != nil {
		return err
	}
	for _, shard := range shards {
		if len(shard) != 1 {
			continue
		}
		dir := filepath.Join(l.Layers, shard)
		layers, err := names(dir)
		if err != nil {
			return err
		}
		for _, name := range layers {
			if id.Valid(name) == nil && !l.rec.Container(id.Container(name)) {
				l.add(l.folder(leftover.Layer, filepath.Join(dir, name), "writable layer of a container that is not on record"))
			}
		}
	}
	return nil
}

func (l *look) folder(kind leftover.Kind, path, why string) leftover.Finding {
	f := leftover.Finding{Kind: kind, Name: path, Detail: why, Remove: func(context.Context) error {
		if l.onRecord(filepath.Base(path)) {
			return nil
		}
		// What is mounted in it is not ours to empty.
		if in, err := mountsBelow(path); err != nil || len(in) > 0 {
			return errors.Join(err, fmt.Errorf("%s: %s is mounted in it", path, strings.Join(in, ", ")))
		}
		return os.RemoveAll(path)
	}}
	if st, err := os.Lstat(path); err == nil {
		f.Since = st.ModTime()
	}
	return f
}

// bundles looks for containers of external runtimes. Their runtime must be asked to
// forget them, which a supervisor does when it starts.
func (l *look) bundles() error {
	paths, err := filepath.Glob(filepath.Join(l.State, "external", "*", "bundles", "*"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		if c := filepath.Base(path); id.Valid(c) == nil && !l.rec.Container(id.Container(c)) {
			l.add(leftover.Finding{Kind: leftover.Bundle, Name: path, Detail: "bundle of an external runtime, of a container that is not on record",
				Remedy: "the next supervisor takes it down at its start"})
		}
	}
	return nil
}

// logs looks for log files that the supervisor has open and that are no container's.
func (l *look) logs() error {
	if l.SupervisorPid <= 0 || l.SkipLogs {
		return nil
	}
	dir := "/proc/" + strconv.Itoa(l.SupervisorPid) + "/fd"
	fds, err := names(dir)
	if err != nil {
		return fmt.Errorf("descriptors of the supervisor: %w", err)
	}
	open := map[string]bool{}
	buf := make([]byte, unix.PathMax)
	for _, fd := range fds {
		n, err := unix.Readlink(dir+"/"+fd, buf)
		if err != nil || n == 0 || buf[0] != '/' {
			continue
		}
		if base := filepath.Base(string(buf[:n])); strings.Contains(base, ".log") {
			open[string(buf[:n])] = true
		}
	}
	if len(open) == 0 {
		return nil
	}
	known := map[string]bool{filepath.Join(l.State, "supervisor.log"): true}
	for _, path := range l.rec.Logs() {
		known[path] = true
	}
	for path := range open {
		// A rotated log has its name and a suffix; a kubelet may have deleted it.
		name := strings.TrimSuffix(path, " (deleted)")
		i := strings.LastIndex(name, ".log") + len(".log")
		if known[name] || known[name[:i]] {
			continue
		}
		if real, err := filepath.EvalSymlinks(filepath.Dir(name)); err == nil && l.samePlace(known, filepath.Join(real, filepath.Base(name[:i]))) {
			continue
		}
		l.add(leftover.Finding{Kind: leftover.Log, Name: path, Detail: "open in the supervisor, and no container on record has this log",
			Remedy: "it is closed when the container's last process ends"})
	}
	return nil
}

// samePlace reports whether one of the known paths leads, through symbolic links, to path.
func (l *look) samePlace(known map[string]bool, path string) bool {
	for k := range known {
		if filepath.Base(k) != filepath.Base(path) {
			continue
		}
		if real, err := filepath.EvalSymlinks(filepath.Dir(k)); err == nil && filepath.Join(real, filepath.Base(k)) == path {
			return true
		}
	}
	return false
}

// aside lists the records that were set aside.
func (l *look) aside() error {
	var errs []error
	for _, book := range []string{"pods", "containers"} {
		dir := filepath.Join(l.Records, book)
		all, err := names(dir)
		errs = append(errs, err)
		for _, name := range all {
			if strings.HasSuffix(name, ".json.bad") {
				l.add(Aside(filepath.Join(dir, name), "set aside because it could not be read"))
			}
		}
	}
	return errors.Join(errs...)
}

// Aside is a record that cannot be read.
func Aside(path, why string) leftover.Finding {
	f := leftover.Finding{Kind: leftover.Record, Name: path, Detail: "record of a pod sandbox or container: " + why,
		Remedy: "remove the file when nobody wants to look into it"}
	if st, err := os.Lstat(path); err == nil {
		f.Since = st.ModTime()
	}
	return f
}
