package spec

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/sandbox/model"
)

// security sets what confines the process besides its capabilities. A
// privileged container has none of it.
func security(in Input, s *specs.Spec) error {
	sec := in.Container.Security
	if err := selinuxLabels(in, s); err != nil {
		return err
	}
	if sec.Privileged {
		return nil
	}
	// Verbatim: an empty list means no masking (procMount Unmasked).
	for _, l := range []struct {
		field string
		paths []string
		to    *[]string
	}{{"masked_paths", sec.MaskedPaths, &s.Linux.MaskedPaths}, {"readonly_paths", sec.ReadonlyPaths, &s.Linux.ReadonlyPaths}} {
		for i, p := range l.paths {
			if !path.IsAbs(p) || strings.IndexByte(p, 0) >= 0 {
				return fmt.Errorf("%s[%d] %q: not an absolute path: %w", l.field, i, p, errdefs.ErrInvalidArgument)
			}
		}
		*l.to = slices.Clone(l.paths)
	}
	if err := seccompFilter(in, s); err != nil {
		return err
	}
	return appArmor(in, s)
}

func seccompFilter(in Input, s *specs.Spec) (err error) {
	p := in.Container.Security.Seccomp
	if p == nil {
		return nil // CRI: not set is unconfined
	}
	if err := checkProfile("seccomp", p); err != nil {
		return err
	}
	if p.Type == model.ProfileUnconfined {
		return nil
	}
	if !in.Host.Seccomp {
		return fmt.Errorf("seccomp: this node's kernel has none; use Unconfined: %w", errdefs.ErrFailedPrecondition)
	}
	if p.Type == model.ProfileRuntimeDefault {
		s.Linux.Seccomp, err = defaults.get(s)
		return err
	}
	if !path.IsAbs(p.Ref) {
		return fmt.Errorf("seccomp.localhost_ref %q: not an absolute path: %w", p.Ref, errdefs.ErrInvalidArgument)
	}
	text, err := in.Node.ReadFile(p.Ref)
	if err != nil {
		return fmt.Errorf("seccomp.localhost_ref %q: %w; put the profile there: %w", p.Ref, err, errdefs.ErrInvalidArgument)
	}
	f, err := seccomp.LoadProfile(string(text), s)
	if err == nil {
		err = checkFilter(f)
	}
	if err != nil {
		return fmt.Errorf("seccomp.localhost_ref %q: not a seccomp profile: %w: %w", p.Ref, err, errdefs.ErrInvalidArgument)
	}
	s.Linux.Seccomp = f
	return nil
}

// checkProfile refuses a reference that would be ignored, and a missing one: an
// empty Localhost profile once meant unconfined (CVE-2023-2431).
func checkProfile(field string, p *model.Profile) error {
	switch p.Type {
	case model.ProfileRuntimeDefault, model.ProfileUnconfined:
		if p.Ref != "" {
			return fmt.Errorf("%s.localhost_ref %q: set with a profile type other than Localhost; clear it: %w", field, p.Ref, errdefs.ErrInvalidArgument)
		}
	case model.ProfileLocalhost:
		if p.Ref == "" {
			return fmt.Errorf("%s.localhost_ref: empty; name the profile: %w", field, errdefs.ErrInvalidArgument)
		}
	default:
		return fmt.Errorf("%s.profile_type %d: unknown; use RuntimeDefault, Unconfined or Localhost: %w", field, p.Type, errdefs.ErrInvalidArgument)
	}
	return nil
}

var seccompActions = []specs.LinuxSeccompAction{
	specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActErrno,
	specs.ActTrace, specs.ActAllow, specs.ActLog, specs.ActNotify,
}

// checkFilter refuses what parses as JSON but confines nothing, such as {}.
func checkFilter(f *specs.LinuxSeccomp) error {
	if f == nil || !slices.Contains(seccompActions, f.DefaultAction) {
		return fmt.Errorf("it has no known defaultAction")
	}
	for i, c := range f.Syscalls {
		if !slices.Contains(seccompActions, c.Action) {
			return fmt.Errorf("syscalls[%d] has unknown action %q", i, c.Action)
		}
		if len(c.Names) == 0 {
			return fmt.Errorf("syscalls[%d] names no system call", i)
		}
	}
	return nil
}

// defaultFilters keeps the default profile for each set of capabilities that
// was asked for: building it decides some 60 rules.
type defaultFilters struct {
	mu   sync.Mutex
	made map[string]*specs.LinuxSeccomp
}

// Few sets of capabilities occur on a node; a requester who makes up many only
// loses the saving.
const maxFilters = 64

var defaults = defaultFilters{made: map[string]*specs.LinuxSeccomp{}}

func (d *defaultFilters) get(s *specs.Spec) (*specs.LinuxSeccomp, error) {
	key := strings.Join(s.Process.Capabilities.Bounding, " ")
	d.mu.Lock()
	f := d.made[key]
	d.mu.Unlock()
	if f == nil {
		var err error
		if f, err = seccomp.GetDefaultProfile(s); err != nil {
			return nil, fmt.Errorf("default seccomp profile: %w", err)
		}
		d.mu.Lock()
		if len(d.made) >= maxFilters {
			clear(d.made)
		}
		d.made[key] = f
		d.mu.Unlock()
	}
	return copyFilter(f), nil
}

// copyFilter is a deep copy: no two containers share parts of a spec (invariant I23).
func copyFilter(f *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	out := *f
	out.Architectures = slices.Clone(f.Architectures)
	out.Flags = slices.Clone(f.Flags)
	out.Syscalls = make([]specs.LinuxSyscall, len(f.Syscalls))
	for i, c := range f.Syscalls {
		c.Names, c.Args = slices.Clone(c.Names), slices.Clone(c.Args)
		if c.ErrnoRet != nil {
			errno := *c.ErrnoRet
			c.ErrnoRet = &errno
		}
		out.Syscalls[i] = c
	}
	if f.DefaultErrnoRet != nil {
		errno := *f.DefaultErrnoRet
		out.DefaultErrnoRet = &errno
	}
	return &out
}

func appArmor(in Input, s *specs.Spec) error {
	p := in.Container.Security.AppArmor
	asked := p != nil
	if !asked {
		p = &model.Profile{Type: model.ProfileRuntimeDefault}
	}
	if err := checkProfile("apparmor", p); err != nil {
		return err
	}
	switch {
	case p.Type == model.ProfileUnconfined:
		if in.Host.AppArmor {
			s.Process.ApparmorProfile = "unconfined"
		}
	case p.Type == model.ProfileLocalhost:
		if !in.Host.AppArmor {
			return fmt.Errorf("apparmor.localhost_ref %q: this node has no AppArmor; use RuntimeDefault or Unconfined: %w", p.Ref, errdefs.ErrFailedPrecondition)
		}
		if strings.ContainsFunc(p.Ref, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return fmt.Errorf("apparmor.localhost_ref %q: not a profile name: %w", p.Ref, errdefs.ErrInvalidArgument)
		}
		s.Process.ApparmorProfile = p.Ref
	case in.Host.AppArmorDefault:
		s.Process.ApparmorProfile = DefaultAppArmorProfile
	case in.Host.AppArmor && asked:
		return fmt.Errorf("apparmor: the default profile %s is not loaded; install apparmor_parser and restart the daemon: %w", DefaultAppArmorProfile, errdefs.ErrFailedPrecondition)
	}
	return nil
}

var (
	selinuxName  = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)
	selinuxLevel = regexp.MustCompile(`^s\d+(-s\d+)?(:c\d+([.,]c\d+)*(-s\d+:c\d+([.,]c\d+)*)?)?$`)
)

// CheckSELinux reports whether o can be part of a label. It is checked on hosts
// without SELinux too: a bad label is an error of the request wherever it runs.
func CheckSELinux(o *model.SELinux) error {
	if o == nil {
		return nil
	}
	for _, f := range []struct {
		field, value string
		grammar      *regexp.Regexp
	}{{"user", o.User, selinuxName}, {"role", o.Role, selinuxName}, {"type", o.Type, selinuxName}, {"level", o.Level, selinuxLevel}} {
		if f.value != "" && !f.grammar.MatchString(f.value) {
			return fmt.Errorf("selinux_options.%s %q: malformed: %w", f.field, f.value, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func selinuxLabels(in Input, s *specs.Spec) error {
	o := in.Container.Security.SELinux
	if o == nil {
		o = in.Pod.SELinux
	}
	if err := CheckSELinux(o); err != nil {
		return err
	}
	if !in.Host.SELinux || in.Container.Security.Privileged {
		return nil
	}
	var options []string
	if o != nil {
		for _, f := range [][2]string{{"user", o.User}, {"role", o.Role}, {"type", o.Type}, {"level", o.Level}} {
			if f[1] != "" {
				options = append(options, f[0]+":"+f[1])
			}
		}
	}
	var err error
	s.Process.SelinuxLabel, s.Linux.MountLabel, err = in.Node.SELinuxLabels(options)
	if err != nil {
		return fmt.Errorf("selinux_options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}
