package leftover

import (
	"fmt"
	"testing"
	"time"
)

func names(all []Finding) (out []string) {
	for _, f := range all {
		out = append(out, string(f.Kind)+" "+f.Name)
	}
	return out
}

// TestSeenOnceDoesNotCount: what is gone at the second look never counted, what
// stays counts once as new, and what comes back begins anew.
func TestSeenOnceDoesNotCount(t *testing.T) {
	s := Sightings{Settle: 2 * time.Second}
	at := time.Unix(1000, 0)
	passing, stays := Finding{Kind: Link, Name: "passing"}, Finding{Kind: Link, Name: "stays"}
	other := Finding{Kind: Cgroup, Name: "stays"}
	steps := []struct {
		after        time.Duration
		found        []Finding
		count, first int
		fresh        int
	}{
		{0, []Finding{passing, stays, stays}, 0, 0, 2},
		{time.Second, []Finding{stays, other}, 0, 0, 2},
		{time.Second, []Finding{passing, stays, other}, 1, 1, 2}, // passing was away: it begins again
		{time.Second, []Finding{stays, other}, 2, 1, 0},
		{time.Second, nil, 0, 0, 0},
		{time.Second, []Finding{stays}, 0, 0, 1},
	}
	for i, step := range steps {
		at = at.Add(step.after)
		count, first, fresh := s.Seen(step.found, at)
		if len(count) != step.count || len(first) != step.first || fresh != step.fresh {
			t.Errorf("step %d: %v count, %d of them new, %d fresh; want %d, %d, %d", i, names(count), len(first), fresh, step.count, step.first, step.fresh)
		}
	}
}

func TestSortPutsWhatIsInsideFirst(t *testing.T) {
	all := []Finding{{Kind: Layer, Name: "a"}, {Kind: Cgroup, Name: "b"}, {Kind: Process, Name: "9"}, {Kind: Cgroup, Name: "a"}, {Kind: Mount, Name: "z"}}
	Sort(all)
	if got := fmt.Sprint(names(all)); got != "[process 9 cgroup a cgroup b mount z layer a]" {
		t.Error(got)
	}
}
