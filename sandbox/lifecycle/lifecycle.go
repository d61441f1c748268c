// Package lifecycle is the state machine of pod sandboxes and containers. It
// does no I/O: Step takes an event and returns the next state and what the
// engine must do about it, in order. Every change of state in the engine goes
// through it.
package lifecycle

import "fmt"

// State of a pod sandbox or a container. The transitional ones are journalled
// before the act, so that a crash in the middle is seen and undone.
type State string

// States of containers; pods have Creating, Ready, Stopping, NotReady and Removing.
const (
	None     State = ""         // not there (any more)
	Creating State = "creating" // being made; undone after a crash
	Created  State = "created"
	Starting State = "starting" // the supervisor was asked; it knows what became of it
	Running  State = "running"
	Exited   State = "exited"
	Removing State = "removing" // going; finished after a crash

	Ready    State = "ready"
	Stopping State = "stopping" // going down; a stop is finished by the next one
	NotReady State = "notready"
)

// Event is something that was asked or that happened.
type Event string

// Events.
const (
	Ask         Event = "ask"          // RunPodSandbox, CreateContainer
	Made        Event = "made"         // all its steps are done
	Failed      Event = "failed"       // a step failed and all were undone
	Start       Event = "start"        // StartContainer
	Started     Event = "started"      // the program runs
	StartFailed Event = "start-failed" // it could not be run
	Exit        Event = "exit"         // its first process ended
	Lost        Event = "lost"         // nobody knows its processes (any more)
	Stop        Event = "stop"         // StopPodSandbox
	Stopped     Event = "stopped"
	Remove      Event = "remove"
	Removed     Event = "removed"
)

// Effect is what the engine must do after a step, in the order given.
type Effect string

// Effects.
const (
	Journal Effect = "journal" // write the record
	Publish Effect = "publish" // make the new status visible
	Forget  Effect = "forget"  // drop record and status
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
