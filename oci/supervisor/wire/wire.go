// Package wire is the protocol between the daemon and the supervisor: frames of
// a JSON header over a unix stream socket, with file descriptors attached
// (SCM_RIGHTS). It is versioned: an old supervisor must serve a new daemon, so
// fields are only ever added and unknown fields are ignored.
//
// Each request frame has an id and gets exactly one response frame with that
// id; requests are served concurrently and answered in any order. Exit
// notifications (Op "exit", no id) are pushed to every connection that said
// Hello with Events set.
package wire

import (
	"encoding/json"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
)

// Version is the newest protocol version this code speaks.
const Version = 4

// VersionCommand is the first version that knows Create.Command.
const VersionCommand = 2

// VersionTakeover is the first version whose containers can be handed to another
// supervisor, and that tells a client of the same version the pidfd of each exec.
const VersionTakeover = 4

// Op names a request.
type Op string

// Requests of version 1.
const (
	OpHello      Op = "hello"       // Hello -> HelloReply
	OpList       Op = "list"        // nil -> ListReply
	OpCreate     Op = "create"      // Create -> nil
	OpStart      Op = "start"       // Start -> StartReply
	OpSignal     Op = "signal"      // Signal -> nil
	OpDelete     Op = "delete"      // Target -> nil; kills what still runs; not found is success
	OpUpdate     Op = "update"      // Update -> nil
	OpPause      Op = "pause"       // Target -> nil
	OpResume     Op = "resume"      // Target -> nil
	OpReopenLog  Op = "reopen-log"  // ReopenLog -> nil
	OpResize     Op = "resize"      // Resize -> nil
	OpAttach     Op = "attach"      // Target + fds [stdout, stderr] (either may be /dev/null) -> nil
	OpStdin      Op = "stdin"       // Target -> nil + fd: a duplicate of the container's stdin (pipe or pty master)
	OpCloseStdin Op = "close-stdin" // Target -> nil
	OpExec       Op = "exec"        // Exec + fds [stdin, stdout, stderr] (none with a terminal) -> ExecReply (+ fd: pty master)
	OpPutFD      Op = "put-fd"      // Keys + one fd each -> nil: keep descriptors across restarts of the daemon
	OpGetFD      Op = "get-fd"      // Keys -> nil + one fd each; all or not found
	OpDropFD     Op = "drop-fd"     // Keys -> nil; not found is success
	OpListFD     Op = "list-fd"     // nil -> ListFDReply
	OpExit       Op = "exit"        // notification: Exit
)

// Requests of version 2. A Create whose profile is named by its digest has an op
// of its own: a supervisor of version 1 would not know the field and start the
// container unconfined.
const (
	OpProfile       Op = "profile"        // Profile -> nil: keep a seccomp profile for later Creates
	OpCreateProfile Op = "create-profile" // Create with Seccomp -> nil, or ErrUnknownProfile
)

// Requests of version 3.
const (
	OpUserNamespace Op = "user-namespace" // UserNamespace -> nil + fds: it, and one of each of Kinds
)

// Requests of version 4: what the daemon holds of the containers, so that the
// next supervisor can go on with them when this one dies.
const (
	OpHoldings Op = "holdings"  // Holdings -> HoldingsReply + fds: what to hold of containers
	OpAdopt    Op = "adopt"     // Holding + its fds -> nil: go on with a container of a dead supervisor
	OpLanes    Op = "lanes"     // Lanes -> LanesReply + LaneFDs fds each
	OpPutLanes Op = "put-lanes" // nil + LaneFDs fds each -> nil: the lanes of a dead supervisor, before its containers
	OpSettled  Op = "settled"   // nil -> nil: nothing more is adopted; what external runtimes still have of a dead supervisor's containers is removed
	OpFollow   Op = "follow"    // Follow + fds [pidfd] or [pidfd, pty master] -> nil: the exit of an exec goes to this connection
	OpUpgrade  Op = "upgrade"   // Upgrade -> the connection ends and the other program serves the next, or an error
	OpLane     Op = "lane"      // notification: one lane + LaneFDs fds, to be held
	OpLaneGone Op = "lane-gone" // notification: a lane, not to be held any longer
)

// LaneFDs is how many descriptors a lane has (package lane).
const LaneFDs = 3

// Frame is the header of every message. FDs says how many descriptors of the
// SCM_RIGHTS stream belong to this frame.
type Frame struct {
	ID   uint64          `json:"id,omitempty"`
	Op   Op              `json:"op,omitempty"` // requests and notifications
	FDs  int             `json:"fds,omitempty"`
	Err  *Error          `json:"err,omitempty"` // responses
	Body json.RawMessage `json:"body,omitempty"`
}

// Error is an error with its errdefs kind, in words that survive versions.
type Error struct {
	Kind string `json:"kind"` // "not-found", "invalid", "exists", "precondition", "denied", "unavailable", "unimplemented", "exhausted", "internal", "unknown-profile" (version 2)
	Text string `json:"text"`
}

// Hello opens a connection.
type Hello struct {
	Version int  `json:"version"`
	Events  bool `json:"events,omitempty"`
}

// HelloReply tells who serves.
type HelloReply struct {
	Version int    `json:"version"`
	Pid     int    `json:"pid"`
	Build   string `json:"build"`
}

// Target names a container.
type Target struct {
	ID id.Container `json:"id"`
}

// Create makes a container. Namespaces and Mounts map a namespace type and a
// mount-source name to keys of descriptors kept with OpPutFD.
type Create struct {
	ID         id.Container                        `json:"id"`
	Handler    string                              `json:"handler"`
	Command    *oci.Command                        `json:"command,omitempty"` // of a handler that is an external runtime; since version 2
	Bundle     string                              `json:"bundle,omitempty"`  // for hooks: oci.CreateRequest; since version 2
	Spec       *specs.Spec                         `json:"spec"`
	Rootfs     oci.Rootfs                          `json:"rootfs"`
	Namespaces map[specs.LinuxNamespaceType]string `json:"namespaces,omitempty"`
	JoinPID    id.Container                        `json:"joinPID,omitempty"` // join the PID namespace of this running container
	Mounts     map[string]string                   `json:"mounts,omitempty"`
	Volumes    map[string]oci.Volume               `json:"volumes,omitempty"` // images by mount-source name
	PodInit    bool                                `json:"podInit,omitempty"`
	Stdin      bool                                `json:"stdin,omitempty"`
	StdinOnce  bool                                `json:"stdinOnce,omitempty"`
	// Env replaces Spec.Process.Env when it is set: environment values are raw
	// bytes, and JSON strings carry UTF-8 only.
	Env [][]byte `json:"env,omitempty"`
	// Seccomp is the digest of a Profile that stands for Spec.Linux.Seccomp, which
	// is not set then; with OpCreateProfile only.
	Seccomp string `json:"seccomp,omitempty"`
}

// UserNamespace makes a user namespace with the embedded runtime (see
// oci.UserNamespaceRequest, whose fields these are). The supervisor keeps none of
// the descriptors until they are put.
type UserNamespace struct {
	UIDs   []specs.LinuxIDMapping     `json:"uids"`
	GIDs   []specs.LinuxIDMapping     `json:"gids"`
	Kinds  []specs.LinuxNamespaceType `json:"kinds,omitempty"`
	Layers []string                   `json:"layers,omitempty"`
}

// Profile is a seccomp profile (linux.seccomp as JSON, at most MaxProfile bytes)
// and its digest, the SHA-256 of Text in hexadecimal. It is kept for as long as
// there is room and the supervisor runs.
type Profile struct {
	Digest string          `json:"digest"`
	Text   json.RawMessage `json:"text"`
}

// MaxProfile is the longest text of a Profile, in bytes; longer ones travel in
// the spec.
const MaxProfile = 1 << 20

// Start runs a created container. LogPath "" discards output; otherwise the
// file is opened O_APPEND (made if missing, with parents) before the program runs.
type Start struct {
	ID      id.Container `json:"id"`
	LogPath string       `json:"logPath,omitempty"`
}

// StartReply is the answer to Start. Since version 4 it has descriptors, which
// Holding.Files names: the daemon completes Holding with what it sent to create
// the container.
type StartReply struct {
	Pid       int       `json:"pid"`
	StartedAt time.Time `json:"startedAt"`
	Holding   *Holding  `json:"holding,omitempty"`
}

// Holding is what the next supervisor must know of a container to go on with it.
// It comes with the descriptors that Files names, in that order.
type Holding struct {
	ID id.Container `json:"id"`
	// Op and Create are the request that made the container: OpCreate or
	// OpCreateProfile, and its body.
	Op     Op              `json:"op,omitempty"`
	Create json.RawMessage `json:"create,omitempty"`
	// Profile is the text of the profile that Create names by its digest. An OpAdopt
	// may leave it out where OpProfile has sent it.
	Profile json.RawMessage `json:"profile,omitempty"`

	Pid       int       `json:"pid"`
	StartedAt time.Time `json:"startedAt"`
	LogPath   string    `json:"logPath,omitempty"`
	// Runtime is what the runtime wants to be told of the container.
	Runtime json.RawMessage `json:"runtime,omitempty"`
	// Exit is set when the container has ended; then Files has no stdio.
	Exit  *Exit  `json:"exit,omitempty"`
	Files []File `json:"files,omitempty"`
}

// File names a descriptor of a Holding.
type File string

// Descriptors of a Holding. Those of the runtime come last, any number of them.
const (
	FilePid     File = "pidfd"
	FileStdin   File = "stdin"   // write end of a pipe
	FileStdout  File = "stdout"  // read end of a pipe
	FileStderr  File = "stderr"  // read end of a pipe
	FileConsole File = "console" // pty master: then there are no pipes
	FileRuntime File = "runtime"
)

// Holdings asks for what is to be held of containers; those that are not started,
// or not there, are left out of the answer.
type Holdings struct {
	IDs []id.Container `json:"ids"`
}

// HoldingsReply is the answer to Holdings. It may stop before the end for want of
// room; the rest is asked for again. The descriptors are those of the first, then
// those of the second, and so on.
type HoldingsReply struct {
	Holdings []Holding `json:"holdings"`
	// Done is how many of the ids were gone through.
	Done int `json:"done"`
}

// Lanes asks for the lanes from number From on.
type Lanes struct {
	From int `json:"from"`
}

// LanesReply names the lanes that come with it, and says how many there are. A
// lane keeps its number as long as it is held. It is the body of OpLane and OpLaneGone, too.
type LanesReply struct {
	IDs   []int `json:"ids"`
	Total int   `json:"total"`
}

// Follow names an exec that was started over another connection. When it is
// unknown it is taken over by its pidfd. With Terminal the pty master comes too.
type Follow struct {
	ID       id.Container `json:"id"`
	Exec     id.Exec      `json:"exec"`
	Pid      int          `json:"pid"`
	Terminal bool         `json:"terminal,omitempty"`
}

// Upgrade asks the supervisor to become another program, in place: same process,
// same children. Binary is an absolute path.
type Upgrade struct {
	Binary string `json:"binary"`
}

// Signal sends a signal to the container's first process, to one exec when Exec
// is set, or with All (SIGKILL only) to every process of the cgroup.
type Signal struct {
	ID     id.Container `json:"id"`
	Exec   id.Exec      `json:"exec,omitempty"`
	Signal int          `json:"signal"`
	All    bool         `json:"all,omitempty"`
}

// Update changes limits; zero fields keep their value.
type Update struct {
	ID        id.Container          `json:"id"`
	Resources *specs.LinuxResources `json:"resources"`
}

// ReopenLog closes and opens the log file at Path without losing a line.
type ReopenLog struct {
	ID   id.Container `json:"id"`
	Path string       `json:"path"`
}

// Resize sets the terminal size in character cells.
type Resize struct {
	ID     id.Container `json:"id"`
	Exec   id.Exec      `json:"exec,omitempty"`
	Width  uint16       `json:"width"`
	Height uint16       `json:"height"`
}

// Exec runs a further process. Its exit arrives as a notification with Exec set
// on the connection that asked.
type Exec struct {
	ID      id.Container   `json:"id"`
	Exec    id.Exec        `json:"exec"`
	Process *specs.Process `json:"process"`
	Env     [][]byte       `json:"env,omitempty"` // replaces Process.Env, as in Create
}

// ExecReply is the answer to Exec.
type ExecReply struct {
	Pid int `json:"pid"`
}

// Keys names kept descriptors.
type Keys struct {
	Keys []string `json:"keys"`
}

// ListFDReply lists the keys of the kept descriptors.
type ListFDReply struct {
	Keys []string `json:"keys"`
}

// Exit is the record of a process's end. Code is the exit code, or 128 plus the
// signal number. OOMKilled means that the first process died of SIGKILL while
// its cgroup counted an OOM kill. The container's log is complete when this is sent.
type Exit struct {
	ID        id.Container `json:"id"`
	Exec      id.Exec      `json:"exec,omitempty"`
	Pid       int          `json:"pid"`
	Code      int          `json:"code"`
	Signal    int          `json:"signal,omitempty"`
	OOMKilled bool         `json:"oomKilled,omitempty"`
	// Unknown is set when the process ended and nobody can tell how: Code is 255
	// then. Since version 4.
	Unknown    bool      `json:"unknown,omitempty"`
	FinishedAt time.Time `json:"finishedAt"`
}

// State is where a container is in its life, as the supervisor knows it.
type State string

// States.
const (
	Created State = "created"
	Running State = "running"
	Exited  State = "exited"
)

// Info describes one container.
type Info struct {
	ID        id.Container `json:"id"`
	State     State        `json:"state"`
	Pid       int          `json:"pid,omitempty"`
	StartedAt time.Time    `json:"startedAt,omitzero"`
	Exit      *Exit        `json:"exit,omitempty"`
}

// ListReply lists all containers that were created and not deleted.
type ListReply struct {
	Containers []Info `json:"containers"`
}
