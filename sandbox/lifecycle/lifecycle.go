// Package lifecycle is the state machine of pod sandboxes and containers. It
// does no I/O: Step takes an event and returns the next state and what the
// engine must do about it, in order. Every change of state in the engine goes
// through it.
package lifecycle

import "fmt"

//go:generate go test -run TestDocument . -update

// State of a pod sandbox or a container. The transitional ones are journalled
// before the act, so that a crash in the middle is seen and undone.
type State string

// States of containers; pods have Creating, Ready, Stopping, NotReady and Removing.
// The sentences here and at the events are those of docs/state.md.
const (
	None     State = ""         // Not there, or not there any more.
	Creating State = "creating" // Being made. A daemon that finds it on record after a crash takes it down.
	Created  State = "created"  // Made; no program has run.
	Starting State = "starting" // The supervisor was asked to run the program, and knows what became of it.
	Running  State = "running"  // The first process lives, or nobody has proved that it does not.
	Exited   State = "exited"   // The first process has ended, or could not be run.
	Removing State = "removing" // Going. A daemon that finds it on record goes on with it.

	Ready    State = "ready"    // Network and namespaces are there; containers may be made.
	Stopping State = "stopping" // Going down, or a stop has failed. Each further stop tries again.
	NotReady State = "notready" // Stopped or lost. What it still holds is freed by a stop.
)

// Event is something that was asked or that happened.
type Event string

// Events.
const (
	Ask         Event = "ask"          // RunPodSandbox or CreateContainer was called.
	Made        Event = "made"         // All steps of its making are done.
	Failed      Event = "failed"       // A step of its making failed, and all were undone.
	Start       Event = "start"        // StartContainer was called.
	Started     Event = "started"      // The supervisor says that the program runs.
	StartFailed Event = "start-failed" // The program could not be run.
	Exit        Event = "exit"         // Its first process ended. An exit is reported at least once.
	Lost        Event = "lost"         // Its processes or namespaces are gone and nobody saw how: a reboot, a dead supervisor.
	Stop        Event = "stop"         // StopPodSandbox was called, or an undo failed.
	Stopped     Event = "stopped"      // Everything that it held is free.
	Remove      Event = "remove"       // RemovePodSandbox or RemoveContainer was called, or an undo failed.
	Removed     Event = "removed"      // Nothing of it is left.
)

// Effect is what the engine must do after a step, in the order given.
type Effect string

// Effects.
const (
	Journal Effect = "journal" // Write the record.
	Publish Effect = "publish" // Make the new status visible.
	Forget  Effect = "forget"  // Drop record and status.
)

type edge struct {
	from State
	on   Event
}

type target struct {
	to      State
	effects []Effect
}

var (
	show   = []Effect{Journal, Publish}
	hidden = []Effect{Journal}
	gone   = []Effect{Forget}
)

var containers = map[edge]target{
	{None, Ask}:             {Creating, hidden},
	{Creating, Made}:        {Created, show},
	{Creating, Failed}:      {None, gone},
	{Created, Start}:        {Starting, hidden},
	{Starting, Started}:     {Running, show},
	{Starting, Made}:        {Created, show}, // after a crash: the start never reached the supervisor
	{Starting, StartFailed}: {Exited, show},
	{Starting, Exit}:        {Exited, show}, // it ended before the answer to the start came
	{Starting, Lost}:        {Exited, show},
	{Running, Exit}:         {Exited, show},
	{Running, Lost}:         {Exited, show},
	{Created, Lost}:         {Exited, show},
	{Exited, Exit}:          {Exited, nil}, // exit records arrive at least once
	{Exited, Lost}:          {Exited, nil},
	{Creating, Remove}:      {Removing, hidden},
	{Created, Remove}:       {Removing, hidden},
	{Exited, Remove}:        {Removing, hidden},
	{Removing, Remove}:      {Removing, nil}, // a removal that failed is tried again
	{Removing, Exit}:        {Removing, nil},
	{Removing, Lost}:        {Removing, nil},
	{Removing, Removed}:     {None, gone},
}

var pods = map[edge]target{
	{None, Ask}:         {Creating, hidden},
	{Creating, Made}:    {Ready, show},
	{Creating, Failed}:  {None, gone},
	{Creating, Stop}:    {Stopping, show}, // what its undo could not free stays stoppable
	{Ready, Stop}:       {Stopping, show},
	{Ready, Lost}:       {NotReady, show},
	{Stopping, Stop}:    {Stopping, nil}, // a stop that failed is tried again
	{Stopping, Lost}:    {Stopping, nil},
	{Stopping, Stopped}: {NotReady, show},
	{NotReady, Stop}:    {Stopping, hidden}, // what it holds may still have to be freed
	{NotReady, Lost}:    {NotReady, nil},
	{NotReady, Remove}:  {Removing, hidden},
	{Removing, Remove}:  {Removing, nil},
	{Removing, Stop}:    {Removing, nil},
	{Removing, Lost}:    {Removing, nil},
	{Removing, Removed}: {None, gone},
}

// Shown is what the CRI shows of a state.
type Shown string

// What the CRI shows.
const (
	Nothing    Shown = "" // it is not listed
	PodReady   Shown = "SANDBOX_READY"
	PodStopped Shown = "SANDBOX_NOTREADY"
	CtrCreated Shown = "CONTAINER_CREATED"
	CtrRunning Shown = "CONTAINER_RUNNING"
	CtrExited  Shown = "CONTAINER_EXITED"
)

// ShowContainer is what a status that is published in state s shows. A step
// without Publish leaves the status that was there.
func ShowContainer(s State) Shown {
	switch s {
	case None, Creating:
		return Nothing
	case Created, Starting:
		return CtrCreated
	case Running:
		return CtrRunning
	}
	return CtrExited
}

// ShowPod is ShowContainer for pod sandboxes.
func ShowPod(s State) Shown {
	switch s {
	case None, Creating:
		return Nothing
	case Ready:
		return PodReady
	}
	return PodStopped
}

// StepContainer returns the state of a container after an event. An event that
// cannot happen in the state is an error and changes nothing.
func StepContainer(s State, e Event) (State, []Effect, error) {
	return step("container", containers, s, e)
}

// StepPod is StepContainer for pod sandboxes.
func StepPod(s State, e Event) (State, []Effect, error) { return step("pod sandbox", pods, s, e) }

func step(noun string, table map[edge]target, s State, e Event) (State, []Effect, error) {
	t, ok := table[edge{s, e}]
	if !ok {
		return s, nil, fmt.Errorf("%s: %q in state %q cannot be", noun, e, s)
	}
	return t.to, t.effects, nil
}
