package crash

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-runtime/berth/test/pace"
)

// supervisorDies is the supervisor as a victim. The daemon starts the next one.
func (n *node) supervisorDies() victim {
	return victim{plan: n.supervisor, gone: func() error {
		for deadline := time.Now().Add(pace.Wait(15 * time.Second)); n.SupervisorPid() == 0; time.Sleep(2 * time.Millisecond) {
			if time.Now().After(deadline) {
				return fmt.Errorf("there is no new supervisor")
			}
		}
		return nil
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

// TestTheSupervisorDiesAgainWhileItTakesOver kills a supervisor, and then the next
// one at each point that it passes while it is given what the first one had: a
// running container, one that is not started, the first process of a PID
// namespace, and namespaces.
func TestTheSupervisorDiesAgainWhileItTakesOver(t *testing.T) {
	n := newNode(t, nil)
	w := newWitness(t, n)
	v := n.supervisorDies()
	kill := func() error {
		if err := syscall.Kill(n.SupervisorPid(), syscall.SIGKILL); err != nil {
			return err
		}
		return v.gone()
	}
	if err := kill(); err != nil {
		t.Fatal(err)
	}
	chosen := []kind{kinds[1], kinds[3]} // in one PID namespace; in a user namespace
	if !long {
		chosen = chosen[seed%2:][:1]
	}
	for _, k := range chosen {
		t.Run(k.name, func(t *testing.T) {
			learn(t, n, k, v)
			before := n.standing(t)
			kills := 0
			for again := 1 + seed%stride(4); ; again += stride(4) {
				died, err := n.dieTakingOver(k, again, v, kill)
				if err != nil {
					t.Errorf("point %d (%s): %v", again, strings.Join(v.plan.points(), " > "), err)
					before = n.standing(t)
				} else if err := n.nothingBeyond(before); err != nil {
					t.Errorf("point %d (%s): %v", again, strings.Join(v.plan.points(), " > "), err)
					before = n.standing(t)
				}
				if !died {
					break
				}
				kills++
			}
			t.Logf("%d deaths while taking over", kills)
			w.check(t)
		})
	}
}

// dieTakingOver lives a life in the middle of which the supervisor is killed, and
// the next one at a point of its own.
func (n *node) dieTakingOver(k kind, again int, v victim, kill func() error) (died bool, err error) {
	l, err := newLife(n, k)
	if err != nil {
		return false, err
	}
	for _, s := range k.stages {
		if err := l.insist(s); err != nil {
			return died, l.abandon(err)
		}
		if s.name != createShort.name {
			continue
		}
		v.plan.points()
		if err := v.plan.arm(again); err != nil {
			return false, err
		}
		err := kill()
		if err == nil {
			err = l.insist(exec) // answered when all is handed over
		}
		died = !v.plan.disarm()
		if err == nil {
			err = l.insist(stage{"the container", (*life).remember})
		}
		if err == nil {
			err = l.insist(startShort)
		}
		if err == nil {
			err = l.insist(end)
		}
		if err != nil {
			return died, l.abandon(err)
		}
	}
	return died, nil
}
