package lifecycle

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var allStates = []State{None, Creating, Created, Starting, Running, Exited, Removing, Ready, Stopping, NotReady}
var allEvents = []Event{Ask, Made, Failed, Start, Started, StartFailed, Exit, Lost, Stop, Stopped, Remove, Removed}

// TestEveryStateAndEvent walks the whole table: what is not an edge is an error
// that leaves the state alone, and every state leads back to None.
func TestEveryStateAndEvent(t *testing.T) {
	for name, m := range map[string]struct {
		table map[edge]target
		step  func(State, Event) (State, []Effect, error)
	}{"container": {containers, StepContainer}, "pod": {pods, StepPod}} {
		reach := map[State]map[State]bool{}
		for _, s := range allStates {
			for _, e := range allEvents {
				want, ok := m.table[edge{s, e}]
				got, effects, err := m.step(s, e)
				switch {
				case ok != (err == nil):
					t.Errorf("%s %q on %q: err %v", name, s, e, err)
				case !ok && got != s:
					t.Errorf("%s %q on %q: a refused event moved it to %q", name, s, e, got)
				case ok && got != want.to:
					t.Errorf("%s %q on %q: %q, want %q", name, s, e, got, want.to)
				case ok && got != s && len(effects) == 0:
					t.Errorf("%s %q on %q: a change without an effect", name, s, e)
				case ok && got == None && (len(effects) != 1 || effects[0] != Forget):
					t.Errorf("%s %q on %q: gone, but effects are %v", name, s, e, effects)
				}
				if ok {
					if reach[s] == nil {
						reach[s] = map[State]bool{}
					}
					reach[s][got] = true
				}
			}
		}
		for s := range reach {
			if !leads(reach, s, None, map[State]bool{}) {
				t.Errorf("%s: state %q never ends", name, s)
			}
		}
	}
}

func leads(reach map[State]map[State]bool, from, to State, seen map[State]bool) bool {
	if from == to && len(seen) > 0 {
		return true
	}
	if seen[from] {
		return false
	}
	seen[from] = true
	for next := range reach[from] {
		if next == to || leads(reach, next, to, seen) {
			return true
		}
	}
	return false
}

// TestScenarios replays testdata/*.txt: lines of "name event -> state effects";
// names that begin with "pod" are pod sandboxes, all others containers.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) { replay(t, file) })
	}
}

func replay(t *testing.T, file string) {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	state := map[string]State{}
	for in, n := bufio.NewScanner(f), 1; in.Scan(); n++ {
		line := strings.TrimSpace(in.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		left, right, ok := strings.Cut(line, " -> ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) != 2 || len(r) == 0 {
			t.Fatalf("%s:%d: want \"name event -> state effects\": %q", file, n, line)
		}
		step := StepContainer
		if strings.HasPrefix(l[0], "pod") {
			step = StepPod
		}
		next, effects, err := step(state[l[0]], Event(l[1]))
		got := []string{string(next)}
		if next == None {
			got[0] = "gone"
		}
		if err != nil {
			got[0] = "refused"
		}
		for _, e := range effects {
			got = append(got, string(e))
		}
		if strings.Join(got, " ") != strings.Join(r, " ") {
			t.Fatalf("%s:%d: %s -> %s, want %s", file, n, left, strings.Join(got, " "), right)
		}
		state[l[0]] = next
	}
}
