// Package layering holds the rules of the house that no compiler checks: which
// package may import which, that each explains itself, and what the supervisor
// may depend on.
package layering

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/berth-runtime/berth/"

// mayImport lists, for each folder of the tree (the longest match counts), the
// folders below it. A package may always import packages of its own folder.
var mayImport = map[string][]string{
	"cmd/berthd":            {"cri", "sandbox", "imageservice", "cni", "oci/supervisor/client", "oci/external", "internal"},
	"cmd/berth-supervisor":  {"oci", "internal"},
	"cmd/berth-oci":         {"oci", "internal"},
	"cmd/berth":             {"cri/streaming/client", "sandbox", "imageservice", "cni", "oci/supervisor/client", "internal"},
	"cri":                   {"sandbox", "imageservice", "cni", "internal"},
	"sandbox":               {"imageservice", "cni", "oci", "internal"},
	"sandbox/model":         {"cni", "internal"},
	"sandbox/spec":          {"sandbox/model", "internal"},
	"sandbox/identity":      {"sandbox/model", "internal"},
	"sandbox/stats":         {"sandbox/model", "internal"},
	"sandbox/podfiles":      {"sandbox/model", "internal"},
	"sandbox/leftovers":     {"oci", "internal"},
	"sandbox/lifecycle":     {},
	"sandbox/journal":       {"sandbox/model", "cni", "internal"},
	"imageservice":          {"internal"},
	"cni":                   {"internal"},
	"oci":                   {"internal"},
	"oci/embedded":          {"oci", "internal"},
	"oci/external":          {"oci", "internal"},
	"oci/supervisor":        {"oci", "internal"},
	"oci/supervisor/client": {"oci", "internal"},
	"oci/supervisor/wire":   {"oci", "internal"},
	"internal":              {},
	"test":                  {"imageservice", "cni", "oci", "internal"},
	"hack":                  {"test", "internal"},
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func below(pkg, folder string) bool { return pkg == folder || strings.HasPrefix(pkg, folder+"/") }

// folderOf is the longest entry of mayImport that holds pkg.
func folderOf(pkg string) string {
	best := ""
	for f := range mayImport {
		if below(pkg, f) && len(f) > len(best) {
			best = f
		}
	}
	return best
}

func TestImportsGoDownOnly(t *testing.T) {
	forEachFile(t, func(path, pkg string, imports []string, _ string) {
		folder := folderOf(pkg)
		if folder == "" {
			t.Errorf("%s: package %s is in no layer; add it to mayImport", path, pkg)
			return
		}
		for _, imp := range imports {
			to, ok := strings.CutPrefix(imp, module)
			if !ok || below(to, folder) {
				continue
			}
			allowed := false
			for _, f := range mayImport[folder] {
				allowed = allowed || below(to, f)
			}
			if !allowed && !strings.HasSuffix(path, "_test.go") {
				t.Errorf("%s: %s must not import %s", path, pkg, to)
			}
		}
	})
}

func TestEveryPackageExplainsItself(t *testing.T) {
	doc := map[string]bool{}
	forEachFile(t, func(path, pkg string, _ []string, text string) {
		doc[pkg] = doc[pkg] || len(text) > 40
	})
	for pkg, ok := range doc {
		if !ok {
			t.Errorf("package %s has no package comment", pkg)
		}
	}
}

// TestTheSupervisorStaysSmall: every module that the supervisor links is memory
// that every node pays and code that must not fail for months.
func TestTheSupervisorStaysSmall(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "./cmd/berth-supervisor")
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	known := []string{module, "golang.org/x/sys/", "github.com/opencontainers/runtime-spec/", "github.com/containerd/errdefs",
		"github.com/opencontainers/cgroups", "github.com/cilium/ebpf", "github.com/opencontainers/selinux", "vendor/"}
	for line := range strings.Lines(string(out)) {
		pkg := strings.TrimSpace(line)
		if pkg == "net/http" {
			t.Error("the supervisor imports net/http")
		}
		first, _, _ := strings.Cut(pkg, "/")
		if !strings.Contains(first, ".") { // standard library
			continue
		}
		ok := false
		for _, k := range known {
			ok = ok || strings.HasPrefix(pkg, k)
		}
		if !ok {
			t.Errorf("new dependency of the supervisor: %s", pkg)
		}
	}
}

func forEachFile(t *testing.T, f func(path, pkg string, imports []string, doc string)) {
	t.Helper()
	base := root(t)
	err := filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") && path != base {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(base, path)
		if err != nil {
			return err
		}
		var imports []string
		for _, i := range file.Imports {
			imports = append(imports, strings.Trim(i.Path.Value, `"`))
		}
		f(rel, filepath.ToSlash(filepath.Dir(rel)), imports, file.Doc.Text())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
