package embedded

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
)

// rdt is a container's place in the resctrl filesystem (linux.intelRdt). Its
// fields are what must be remembered, as JSON, to delete it from another process.
type rdt struct {
	// Group is the directory of the class of service.
	Group string `json:"group"`
	// Made tells that Group is named after the container and was made for it.
	Made bool `json:"made,omitempty"`
	// Monitor is the directory of the container's monitoring group, or "".
	Monitor string `json:"monitor,omitempty"`
}

// maxSchemata is the most that kernfs passes on in one piece: a page.
const maxSchemata = 4096

// openRDT makes or finds the group and the monitoring group of linux.intelRdt and
// writes its schemata (runtime-spec 1.3, config-linux.md, "IntelRdt"). The
// process joins by writing "0" to taskFiles; delete ends it.
func openRDT(id id.Container, c *specs.LinuxIntelRdt) (*rdt, error) {
	if err := checkRDT(id, c); err != nil {
		return nil, err
	}
	root, err := findResctrl()
	if err != nil {
		return nil, err
	}
	if root == "" {
		return nil, fmt.Errorf("linux.intelRdt: no resctrl filesystem is mounted; mount it with \"mount -t resctrl resctrl /sys/fs/resctrl\" where the processor and the kernel have it, or remove the field: %w", errdefs.ErrFailedPrecondition)
	}
	return openRDTAt(resctrl{root, func(dir string) error { return unix.Mkdir(dir, 0o755) }, unix.Rmdir}, id, c)
}

// leftRDT is what openRDT may have left when its process was killed.
func leftRDT(id id.Container, c *specs.LinuxIntelRdt) *rdt {
	root, err := findResctrl()
	if err != nil || root == "" || checkRDT(id, c) != nil {
		return nil
	}
	r := &rdt{Group: filepath.Join(root, string(id)), Made: true}
	if c.ClosID != "" {
		r = &rdt{Group: filepath.Join(root, c.ClosID)}
	}
	if c.EnableMonitoring {
		r.Monitor = filepath.Join(r.Group, "mon_groups", string(id))
	}
	return r
}

// UpdateRDT writes new values of linux.intelRdt.l3CacheSchema and memBwSchema;
// "" leaves one as it is. The container's spec must have linux.intelRdt.
func (c *Container) UpdateRDT(l3Cache, memBw string) error {
	if c.rdt == nil {
		return fmt.Errorf("container %s: its spec has no linux.intelRdt, so it is in no group of resctrl that could be changed: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	root, err := findResctrl()
	if err != nil {
		return err
	}
	return c.rdt.update(resctrl{root: root}, l3Cache, memBw)
}

func (r *rdt) update(on resctrl, l3Cache, memBw string) error {
	now := &specs.LinuxIntelRdt{ClosID: "/", L3CacheSchema: l3Cache, MemBwSchema: memBw}
	if err := checkRDT("", now); err != nil {
		return err
	}
	return on.writeSchemata(r.Group, now, false)
}

// findResctrl finds where resctrl is mounted, "" if it is not.
func findResctrl() (string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("linux.intelRdt: %w", err)
	}
	return resctrlRoot(string(info)), nil
}

// resctrl is a mounted resctrl filesystem.
type resctrl struct {
	root string
	// The kernel fills a new directory with its files, and removes them with it.
	mkdir, rmdir func(dir string) error
}

// resctrlRoot finds the mount of a whole resctrl filesystem.
func resctrlRoot(mountinfo string) string {
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if i := slices.Index(f, "-"); i >= 6 && len(f) > i+1 && f[i+1] == "resctrl" && f[3] == "/" {
			return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(f[4])
		}
	}
	return ""
}

// checkRDT checks what can be checked without resctrl.
func checkRDT(id id.Container, c *specs.LinuxIntelRdt) error {
	if c.ClosID == "" || c.EnableMonitoring {
		if !isGroupName(string(id)) {
			return invalid("linux.intelRdt: the container's id %q can not name a resctrl group", id)
		}
	}
	if c.ClosID != "" && c.ClosID != "/" && !isGroupName(c.ClosID) {
		return invalid("linux.intelRdt.closID %q: want \"/\" or the name of a group, one path element", c.ClosID)
	}
	if c.MemBwSchema != "" && !strings.HasPrefix(c.MemBwSchema, "MB:") {
		return invalid("linux.intelRdt.memBwSchema %q: want \"MB:\" first", c.MemBwSchema)
	}
	for field, v := range map[string]string{"l3CacheSchema": c.L3CacheSchema, "memBwSchema": c.MemBwSchema} {
		if strings.ContainsRune(v, '\n') || len(v) >= maxSchemata {
			return invalid("linux.intelRdt.%s: want one line of less than %d bytes", field, maxSchemata)
		}
	}
	size := 0
	for i, v := range c.Schemata {
		if strings.ContainsRune(v, '\n') {
			return invalid("linux.intelRdt.schemata[%d]: has a newline; use one element for each line", i)
		}
		if size += len(v) + 1; size > maxSchemata {
			return invalid("linux.intelRdt.schemata: more than %d bytes", maxSchemata)
		}
	}
	return nil
}

// isGroupName reports whether a group may have the name, which is none of the
// directories that resctrl has itself.
func isGroupName(s string) bool {
	return s != "" && s != "." && s != ".." && len(s) <= unix.NAME_MAX && !strings.ContainsAny(s, "/\n\x00") &&
		!slices.Contains([]string{"info", "mon_groups", "mon_data"}, s)
}

func openRDTAt(on resctrl, id id.Container, c *specs.LinuxIntelRdt) (_ *rdt, err error) {
	name := c.ClosID
	if name == "" {
		name = string(id)
	}
	r := &rdt{Group: filepath.Join(on.root, name)}
	made := false
	defer func() {
		if err == nil {
			return
		}
		// A group with a closID stays when its container is deleted, but not when
		// it never had one and got no schemata.
		r.Made = made
		err = errors.Join(err, r.deleteFrom(on))
	}()
	schemas := c.L3CacheSchema != "" || c.MemBwSchema != "" || len(c.Schemata) > 0
	if c.ClosID == "" || schemas && c.ClosID != "/" {
		err = on.mkdir(r.Group)
		made = err == nil
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, on.explain(fmt.Errorf("linux.intelRdt: make group %q: %w", name, err))
		}
	}
	r.Made = made && c.ClosID == ""
	if st, err := os.Stat(r.Group); err != nil || !st.IsDir() {
		return nil, fmt.Errorf("linux.intelRdt.closID %q: resctrl has no such group; make it, or set a schema: %w", name, errdefs.ErrFailedPrecondition)
	}
	if err := on.writeSchemata(r.Group, c, !made && c.ClosID != ""); err != nil {
		return nil, err
	}
	if c.EnableMonitoring {
		dir := filepath.Join(r.Group, "mon_groups", string(id))
		// One that exists is of an earlier life of this container.
		if err := on.mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, on.explain(fmt.Errorf("linux.intelRdt.enableMonitoring: make monitoring group: %w", err))
		}
		r.Monitor = dir
	}
	return r, nil
}

// writeSchemata writes the three fields in the spec's order, each in one write:
// the kernel refuses a write that names a cache twice. The first two are only
// compared in a group that others made.
func (on resctrl) writeSchemata(group string, c *specs.LinuxIntelRdt, existing bool) error {
	file := filepath.Join(group, "schemata")
	lines := ""
	for _, l := range c.Schemata {
		lines += l + "\n"
	}
	for _, w := range []struct {
		field, text string
		compare     bool
	}{{"l3CacheSchema", c.L3CacheSchema, existing}, {"memBwSchema", c.MemBwSchema, existing}, {"schemata", lines, false}} {
		switch {
		case w.text == "":
		case w.compare:
			have, err := os.ReadFile(file)
			if err != nil {
				return fmt.Errorf("linux.intelRdt.%s: %w", w.field, err)
			}
			if err := on.compareSchema(w.text, string(have)); err != nil {
				return fmt.Errorf("linux.intelRdt.%s %q: the group of closID %q exists and differs: %w", w.field, w.text, c.ClosID, err)
			}
		default:
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err != nil {
				return fmt.Errorf("linux.intelRdt.%s: %w", w.field, err)
			}
			_, err = f.WriteString(strings.TrimSuffix(w.text, "\n") + "\n")
			f.Close()
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
			if err != nil {
				return on.explain(fmt.Errorf("linux.intelRdt.%s: write schemata: %w", w.field, err))
			}
		}
	}
	return nil
}

// compareSchema checks that the group's schemata have every value of the line
// want, as in "L3:0=7f0;1=1f". The kernel writes numbers in its own form (zeros
// in front, cache ids in order), and bandwidths rounded up to its step.
func (on resctrl) compareSchema(want, have string) error {
	resource, values, err := parseSchema(want)
	if err != nil {
		return err
	}
	for line := range strings.Lines(have) {
		name, got, err := parseSchema(line)
		if err != nil || name != resource {
			continue
		}
		step := uint64(1)
		if resource == "MB" {
			b, _ := os.ReadFile(filepath.Join(on.root, "info/MB/bandwidth_gran"))
			if v, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32); err == nil && v > 0 {
				step = v
			}
		}
		for cache, v := range values {
			g, ok := got[cache]
			if !ok || g != v && g != (v+step-1)/step*step {
				return fmt.Errorf("it has %q: %w", strings.TrimSpace(line), errdefs.ErrFailedPrecondition)
			}
		}
		return nil
	}
	return fmt.Errorf("it has no %s: %w", resource, errdefs.ErrFailedPrecondition)
}

// parseSchema splits a line into its resource and the value of each cache id:
// decimal for bandwidths, hexadecimal bit masks otherwise.
func parseSchema(line string) (resource string, values map[string]uint64, err error) {
	resource, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
	base := 16
	if resource = strings.TrimSpace(resource); strings.HasPrefix(resource, "MB") {
		base = 10
	}
	values = map[string]uint64{}
	for part := range strings.SplitSeq(rest, ";") {
		cache, v, isPair := strings.Cut(part, "=")
		cache, v = strings.TrimSpace(cache), strings.TrimSpace(v)
		if base == 16 {
			v = strings.TrimPrefix(v, "0x")
		}
		n, err1 := strconv.ParseUint(cache, 10, 31)
		m, err2 := strconv.ParseUint(v, base, 32)
		if !ok || !isPair || err1 != nil || err2 != nil {
			return "", nil, invalid("%q: want RESOURCE:ID=VALUE;ID=VALUE", strings.TrimSpace(line))
		}
		values[strconv.FormatUint(n, 10)] = m
	}
	return resource, values, nil
}

// explain adds what the kernel wrote about the last failure.
func (on resctrl) explain(err error) error {
	b, rerr := os.ReadFile(filepath.Join(on.root, "info/last_cmd_status"))
	if text := strings.TrimSpace(string(b)); rerr == nil && text != "" && text != "ok" {
		err = fmt.Errorf("%w (%s)", err, text)
	}
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("%w: the processor has no more of them: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

// taskFiles opens the files to which the container's process writes "0", in this
// order: a monitoring group takes only members of its own class of service.
func (r *rdt) taskFiles() (files []*os.File, err error) {
	for _, dir := range []string{r.Group, r.Monitor} {
		if dir == "" {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, "tasks"), os.O_WRONLY, 0)
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, fmt.Errorf("linux.intelRdt: %w", err)
		}
		files = append(files, f)
	}
	return files, nil
}

// delete removes what openRDT made. A group with a closID stays. What is gone
// already is no error. Tasks that are left go to the group above.
func (r *rdt) delete() error { return r.deleteFrom(resctrl{rmdir: unix.Rmdir}) }

func (r *rdt) deleteFrom(on resctrl) error {
	var errs []error
	for _, x := range []struct {
		dir  string
		ours bool
	}{{r.Monitor, r.Monitor != ""}, {r.Group, r.Made}} {
		if !x.ours {
			continue
		}
		if err := on.rmdir(x.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("linux.intelRdt: remove group %s: %w", x.dir, err))
		}
	}
	return errors.Join(errs...)
}
