package cgroup

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// complete reports whether a v2 cgroup has every controller that the root has:
// then all of its parents hand them down.
func (h *Host) complete(d dir) bool {
	all, err := readFile(filepath.Join(h.Unified, "cgroup.controllers"))
	if err != nil {
		return false
	}
	have, err := readFile(filepath.Join(d.path, "cgroup.controllers"))
	return err == nil && have == all && slices.Contains(strings.Fields(all), "memory")
}

// enableControllers hands every controller of a v2 cgroup down to its children.
// One by one: the kernel takes all or nothing, and one that it refuses must not
// keep back the others. What is missing shows up when its limit is written:
// missing says why.
//
// Nothing is handed down from a cgroup with processes of its own. The kernel
// refuses most controllers there, but for cpu, cpuset and pids it makes the cgroup
// a threaded domain instead, in which no child takes a process of another.
func enableControllers(dir string) {
	have, err := readFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	on, _ := readFile(filepath.Join(dir, "cgroup.subtree_control"))
	enabled := strings.Fields(on)
	checked := false
	for c := range strings.FieldsSeq(have) {
		if slices.Contains(enabled, c) {
			continue
		}
		if !checked && hasProcesses(dir) {
			return
		}
		checked = true
		_ = writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+"+c)
	}
}

// hasProcesses reports whether a cgroup that is not the root, for which other
// rules hold, has processes in itself. The root has no cgroup.type.
func hasProcesses(dir string) bool {
	if _, err := readFile(filepath.Join(dir, "cgroup.type")); err != nil {
		return false
	}
	procs, _ := readFile(filepath.Join(dir, "cgroup.procs"))
	return procs != ""
}

// checkDomain refuses a cgroup that no process can join: one below a threaded
// cgroup. The kernel would say so only when the process is born, as EOPNOTSUPP.
func checkDomain(dir string) error {
	kind, err := readFile(filepath.Join(dir, "cgroup.type"))
	if err != nil || kind != "domain invalid" && kind != "threaded" {
		return nil
	}
	return fmt.Errorf("cgroup %s: its type is %q because a cgroup above it is threaded: put the container below a cgroup whose cgroup.type is \"domain\" (linux.cgroupsPath): %w",
		dir, kind, errdefs.ErrFailedPrecondition)
}

// pseudo are prefixes of v2 files that belong to no controller.
var pseudo = []string{"cgroup", "irq"}

// missing explains why a v2 cgroup lacks a controller's file: it names the
// cgroup that does not hand the controller down, and what to do about it. nil
// means that the controller is there and the kernel does not know the file.
func (h *Host) missing(d dir, file string) error {
	controller, _, _ := strings.Cut(file, ".")
	if slices.Contains(pseudo, controller) {
		return nil
	}
	at := d.Mount
	parts := strings.Split(d.rel, "/")
	for i := range len(parts) + 1 {
		have, err := readFile(filepath.Join(at, "cgroup.controllers"))
		if err != nil {
			return err
		}
		if !slices.Contains(strings.Fields(have), controller) {
			if i == 0 {
				return fmt.Errorf("cgroup %s: cgroup v2 has no %s controller here: the kernel lacks it, it is switched off (cgroup_disable), or cgroup v1 holds it: %w",
					at, controller, errdefs.ErrFailedPrecondition)
			}
			return fmt.Errorf("cgroup %s: its parent does not offer the %s controller%s: %w",
				at, controller, refusal(filepath.Dir(at), controller), errdefs.ErrFailedPrecondition)
		}
		if i < len(parts) {
			at = filepath.Join(at, parts[i])
		}
	}
	return nil
}

// refusal asks the kernel again why it does not hand a controller down.
func refusal(dir, controller string) string {
	busy := ", because " + dir + " has processes of its own: move them to a child cgroup first"
	if hasProcesses(dir) {
		return busy
	}
	err := writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+"+controller)
	switch {
	case errors.Is(err, unix.EBUSY):
		return busy
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return ", because " + dir + " is threaded or has threaded children: use a parent whose cgroup.type is \"domain\""
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.EROFS):
		return ": write \"+" + controller + "\" to cgroup.subtree_control of " + dir + " as root, or delegate it (systemd: Delegate=yes)"
	case err != nil:
		return ": " + err.Error()
	}
	return ": it does now; try again" // a race with whoever else administers the tree
}
