package seccomp

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// TestTables compares the tables with the numbers of golang.org/x/sys, and names
// the calls that came with Linux 6.7 to 6.18 on every architecture.
func TestTables(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "golang.org/x/sys/unix").Output()
	if err != nil {
		t.Skipf("no go command: %v", err)
	}
	dir := strings.TrimSpace(string(out))
	for file, table := range map[string]map[string]uint32{"amd64": x8664Calls, "386": x86Calls, "arm64": arm64Calls, "arm": armCalls} {
		f, err := parser.ParseFile(token.NewFileSet(), dir+"/zsysnum_linux_"+file+".go", nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		ast.Inspect(f, func(x ast.Node) bool {
			v, ok := x.(*ast.ValueSpec)
			if !ok {
				return true
			}
			name, ok := strings.CutPrefix(v.Names[0].Name, "SYS_")
			if !ok || name == "SYSCALL_MASK" { // of arm: no call
				return true
			}
			lit, ok := v.Values[0].(*ast.BasicLit)
			if !ok {
				t.Fatalf("%s: %s has no number", file, name)
			}
			want, err := strconv.ParseUint(lit.Value, 0, 32)
			if err != nil {
				t.Fatal(err)
			}
			n++
			if got, ok := table[strings.ToLower(name)]; !ok || uint64(got) != want {
				t.Errorf("%s: %s is %d, want %d", file, name, got, want)
			}
			return true
		})
		if n != len(table) {
			t.Errorf("%s: %d calls, want %d", file, len(table), n)
		}
	}
	recent := strings.Fields("futex_wake futex_wait futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr" +
		" lsm_list_modules mseal setxattrat getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr")
	for i, name := range recent { // one numbering for all from 424 on
		for arch, table := range map[string]map[string]uint32{"amd64": x8664Calls, "i386": x86Calls, "x32": x32Calls(), "arm64": arm64Calls, "arm": armTable()} {
			if got := table[name] &^ x32Bit; got != uint32(454+i) {
				t.Errorf("%s: %s is %d, want %d", arch, name, got, 454+i)
			}
		}
	}
	for name, nr := range map[string]uint32{"ioctl": 514, "execve": 520, "execveat": 545, "pwritev2": 547, "read": 0} {
		if got := x32Calls()[name]; got != x32Bit|nr {
			t.Errorf("x32: %s is %#x, want %d with bit 30", name, got, nr)
		}
	}
}
