package oci

import "time"

// Command says how a runtime with the OCI command line is called (runc, crun,
// youki, runsc): "Path Args... --root DIR --log FILE --log-format json create ...".
type Command struct {
	Path    string        `json:"path"`              // absolute
	Args    []string      `json:"args,omitempty"`    // global flags
	Timeout time.Duration `json:"timeout,omitempty"` // of one call, in nanoseconds; 0 is the default
}

// Signaler is implemented by containers whose signals have to go through their
// runtime: the process that it names need not be the program (in a virtual
// machine it is the monitor).
type Signaler interface {
	// SignalFirst sends sig to the container's first process.
	SignalFirst(sig int) error
}
