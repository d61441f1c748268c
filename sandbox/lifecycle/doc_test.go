package lifecycle

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/state.md anew from the tables")

const document = "../../docs/state.md"

// TestDocument compares docs/state.md with the tables and with the sentences at
// the constants.
func TestDocument(t *testing.T) {
	want := describe(t)
	if *update {
		if err := os.WriteFile(document, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(document); err != nil || string(got) != want {
		t.Errorf("docs/state.md is not what the tables say (%v): go generate ./sandbox/lifecycle", err)
	}
}

func describe(t *testing.T) string {
	says := sentences(t)
	var b strings.Builder
	fmt.Fprint(&b, `# States

<!-- Made from package sandbox/lifecycle by "go generate ./sandbox/lifecycle"; a test compares. -->

Every change of state goes through these tables; an event that a state has no row for is refused and changes
nothing. The effects are carried out in their order: *journal* writes the record, before anything is done that the
record speaks of; *publish* makes the status visible; *forget* drops both. A step that does not publish leaves the
status that was there. After a restart of the daemon each record is published as its state shows, and compared with
what the supervisor and the kernel say. CONTAINER_UNKNOWN is never shown.
`)
	for _, m := range []struct {
		noun   string
		states []State
		table  map[edge]target
		show   func(State) Shown
	}{
		{"Pod sandboxes", []State{None, Creating, Ready, Stopping, NotReady, Removing}, pods, ShowPod},
		{"Containers", []State{None, Creating, Created, Starting, Running, Exited, Removing}, containers, ShowContainer},
	} {
		fmt.Fprintf(&b, "\n## %s\n\n| state | | the CRI shows |\n|---|---|---|\n", m.noun)
		for _, s := range m.states {
			shown := string(m.show(s))
			if shown == "" {
				shown = "nothing"
			}
			fmt.Fprintf(&b, "| %s | %s | %s |\n", name(s), says[string(s)], shown)
		}
		fmt.Fprint(&b, "\n| state | event | next | effects |\n|---|---|---|---|\n")
		used := map[Event]bool{}
		rows := 0
		for _, s := range m.states {
			for _, e := range allEvents {
				if to, ok := m.table[edge{s, e}]; ok {
					used[e] = true
					rows++
					var effects []string
					for _, f := range to.effects {
						effects = append(effects, string(f))
					}
					fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", name(s), e, name(to.to), strings.Join(effects, ", "))
				}
			}
		}
		if rows != len(m.table) {
			t.Errorf("%s: %d of %d rows: a state or an event is missing from the lists here", m.noun, rows, len(m.table))
		}
		fmt.Fprint(&b, "\n| event | |\n|---|---|\n")
		for _, e := range allEvents {
			if used[e] {
				fmt.Fprintf(&b, "| %s | %s |\n", e, says[string(e)])
			}
		}
	}
	return b.String()
}

func name(s State) string {
	if s == None {
		return "(none)"
	}
	return string(s)
}

// sentences are the comments at the constants of package lifecycle, by value.
func sentences(t *testing.T) map[string]string {
	file, err := parser.ParseFile(token.NewFileSet(), "lifecycle.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || v.Comment == nil || len(v.Values) != 1 {
			return true
		}
		if typ, ok := v.Type.(*ast.Ident); !ok || !slices.Contains([]string{"State", "Event", "Effect"}, typ.Name) {
			return true
		}
		value, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		out[value] = strings.TrimSpace(v.Comment.Text())
		return true
	})
	for _, s := range allStates {
		if !strings.HasSuffix(out[string(s)], ".") {
			t.Errorf("state %q has no sentence", s)
		}
	}
	for _, e := range allEvents {
		if !strings.HasSuffix(out[string(e)], ".") {
			t.Errorf("event %q has no sentence", e)
		}
	}
	return out
}
