package layering

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// byPath are calls that resolve a whole path from the caller's root or working
// directory, following what links there are.
var byPath = []string{
	"os.Open", "os.OpenFile", "os.OpenRoot", "os.OpenInRoot", "os.Create", "os.CreateTemp", "os.Mkdir", "os.MkdirAll", "os.MkdirTemp", "os.ReadFile", "os.WriteFile", "os.ReadDir",
	"os.Stat", "os.Lstat", "os.Readlink", "os.Symlink", "os.Link", "os.Rename", "os.Remove", "os.RemoveAll", "os.Chmod", "os.Chown", "os.Lchown", "os.Chtimes",
	"os.Truncate", "os.DirFS", "os.Chdir", "os.CopyFS", "filepath.Walk", "filepath.WalkDir", "filepath.Glob", "filepath.EvalSymlinks",
	"unix.Open", "unix.Creat", "unix.Mkdir", "unix.Mknod", "unix.Mkfifo", "unix.Mount", "unix.Unmount", "unix.Stat", "unix.Lstat", "unix.Statfs", "unix.Access",
	"unix.Readlink", "unix.Symlink", "unix.Link", "unix.Rename", "unix.Unlink", "unix.Rmdir", "unix.Chmod", "unix.Chown", "unix.Lchown", "unix.Truncate",
	"unix.Chdir", "unix.Chroot", "unix.PivotRoot", "unix.Utimes", "unix.Getxattr", "unix.Lgetxattr", "unix.Setxattr", "unix.Lsetxattr", "unix.Listxattr",
	"unix.Removexattr", "unix.Lremovexattr", "unix.Acct", "unix.Swapon", "unix.InotifyAddWatch",
}

// byName are calls that resolve a name from a descriptor, without the bounds
// that openat2 takes: safe for a name of one component alone.
var byName = []string{
	"unix.Openat", "unix.Openat2", "unix.Mkdirat", "unix.Mknodat", "unix.Symlinkat", "unix.Linkat", "unix.Renameat", "unix.Renameat2", "unix.Unlinkat", "unix.Fchownat",
	"unix.Fchmodat", "unix.Fstatat", "unix.Faccessat", "unix.Faccessat2", "unix.Readlinkat", "unix.Statx", "unix.UtimesNanoAt", "unix.OpenTree", "unix.MoveMount",
}

// mayResolve lists who of the runtime makes such calls: "host" paths that no
// image and no volume has a part in, or "name"s in a directory that is held open.
// Everything else below a container's root goes through kernel.OpenInRoot and
// kernel.MakeInRoot (invariant I1, docs/security.md).
var mayResolve = map[string][]string{
	"internal/kernel/held.go":    {"host: unix.Open", "name: unix.MoveMount unix.Openat"}, // our own namespaces
	"internal/kernel/mkpath.go":  {"name: unix.Openat unix.Mkdirat unix.Mknodat unix.Readlinkat"},
	"internal/kernel/mount.go":   {"host: unix.Mount unix.PivotRoot unix.Unmount", "name: unix.OpenTree unix.MoveMount unix.Mkdirat unix.Mknodat"}, // the empty tree
	"internal/kernel/ns.go":      {"host: os.Open"},                                                                                                // our own namespaces
	"internal/kernel/path.go":    {"name: unix.Openat2"},                                                                                           // OpenInRoot itself
	"internal/kernel/process.go": {"host: os.ReadFile"},                                                                                            // /proc/self/uid_map
	"internal/kernel/waiting.go": {"host: os.Open os.ReadFile"},                                                                                    // /proc
	"oci/embedded/assemble.go":   {"name: unix.Openat2"},                                                                                           // below a root, through no link at all
	"oci/embedded/caps.go":       {"host: os.Open os.ReadFile"},
	"oci/embedded/copyup.go":     {"name: unix.Fchmodat unix.Fchownat unix.Linkat unix.Mkdirat unix.Mknodat unix.Openat unix.Openat2 unix.Readlinkat unix.Statx unix.Symlinkat unix.UtimesNanoAt"},
	"oci/embedded/created.go":    {"host: unix.Open unix.Mkfifo"},                                                  // the gate, in the state directory
	"oci/embedded/dev.go":        {"name: unix.Fchownat unix.Mknodat unix.Openat unix.Symlinkat unix.Unlinkat"},    // in our tmpfs, or the parent that MakeInRoot opened
	"oci/embedded/elf.go":        {"name: unix.Openat"},                                                            // in our tmpfs
	"oci/embedded/holder.go":     {"host: os.OpenFile"},                                                            // our own program
	"oci/embedded/idroot.go":     {"host: os.ReadFile unix.Mount", "name: unix.Mkdirat unix.MoveMount unix.Statx"}, // layers, in a namespace of its own
	"oci/embedded/intelrdt.go":   {"host: os.OpenFile os.ReadFile os.Stat unix.Mkdir unix.Rmdir"},                  // resctrl
	"oci/embedded/namespaces.go": {"host: os.OpenFile", "name: unix.Openat unix.Openat2"},                          // paths of the spec; our procfs
	"oci/embedded/overlay.go":    {"host: os.OpenFile unix.Chdir unix.Mount"},                                      // layers, in a namespace of its own
	"oci/embedded/plan.go":       {"host: os.Stat"},
	"oci/embedded/process.go":    {"host: os.ReadFile os.Stat"},
	"oci/embedded/protect.go":    {"name: unix.Fstatat"},                                                      // in our procfs
	"oci/embedded/root.go":       {"host: os.OpenFile unix.Chroot unix.Mount unix.Open", "name: unix.Openat"}, // root.path; chroot to "."; the empty tree
	"oci/embedded/rootfs.go":     {"host: os.OpenFile"},                                                       // layers
	"oci/embedded/runtime.go":    {"host: os.Open unix.Open"},                                                 // our procfs, the host's /dev/null, both verified
	"oci/embedded/sources.go":    {"host: os.ReadFile", "name: unix.Fchownat unix.Mkdirat unix.Symlinkat"},    // in our tmpfs of a cgroup mount
}

func TestPathsBelowARootAreResolvedInIt(t *testing.T) {
	for _, dir := range []string{"oci/embedded", "internal/kernel"} {
		files, err := filepath.Glob(filepath.Join(root(t), dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range files {
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			name := dir + "/" + filepath.Base(path)
			host, names := callsOf(t, path)
			wantHost, wantNames := allowed(mayResolve[name])
			if !slices.Equal(host, wantHost) {
				t.Errorf("%s resolves paths by %q, mayResolve lists %q: a path with a part of the image's goes through kernel.OpenInRoot or MakeInRoot", name, host, wantHost)
			}
			if !slices.Equal(names, wantNames) {
				t.Errorf("%s resolves names by %q, mayResolve lists %q: such a name is one component, in a directory that is held open", name, names, wantNames)
			}
		}
	}
}

// allowed parses an entry of mayResolve.
func allowed(entry []string) (host, names []string) {
	for _, e := range entry {
		kind, calls, _ := strings.Cut(e, ": ")
		list := strings.Fields(calls)
		slices.Sort(list)
		if kind == "host" {
			host = list
		} else {
			names = list
		}
	}
	return host, names
}

// callsOf lists the calls, and other uses, of the functions above in a file.
func callsOf(t *testing.T, path string) (host, names []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range file.Imports {
		if strings.Contains(i.Path.Value, "securejoin") {
			t.Errorf("%s imports %s: it resolves a path and hands back a string, which is resolved again", path, i.Path.Value)
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		s, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		pkg, ok := s.X.(*ast.Ident)
		if !ok {
			return true
		}
		call := pkg.Name + "." + s.Sel.Name
		if slices.Contains(byPath, call) {
			host = append(host, call)
		}
		if slices.Contains(byName, call) {
			names = append(names, call)
		}
		return true
	})
	for _, l := range []*[]string{&host, &names} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
	}
	return host, names
}
