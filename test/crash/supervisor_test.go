package crash

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/berth-runtime/berth/test/pace"
)

// supervisorDies is the supervisor as a victim. The daemon starts the next one.
func (n *node) supervisorDies() victim {
	pid := n.SupervisorPid()
	return victim{plan: n.supervisor, gone: func() error {
		for deadline := time.Now().Add(pace.Wait(15 * time.Second)); ; time.Sleep(2 * time.Millisecond) {
			if now := n.SupervisorPid(); now != 0 && now != pid {
				pid = now
				return nil
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("no new supervisor; the old one was %d", pid)
			}
		}
	}}
}

// TestTheSupervisorDiesAtEachPoint lives a pod for each point that the supervisor
// passes in each of its calls, and kills the supervisor there.
func TestTheSupervisorDiesAtEachPoint(t *testing.T) {
	n := newNode(t, nil)
	w := newWitness(t, n)
	v := n.supervisorDies()
	// What a supervisor holds of containers that it was given is not quite what one
	// holds that started them: compare with the former.
	if err := syscall.Kill(n.SupervisorPid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := v.gone(); err != nil {
		t.Fatal(err)
	}
	var short []kind
	for _, k := range kinds {
		if k.name != "calls that fail" || long {
			short = append(short, k)
		}
	}
	points(t, n, w, short, v)
}
