// Package sandbox is the engine: it runs pod sandboxes, containers and execs
// through the interfaces of ports.go, one file per verb.
//
// Every mutating call is an operation keyed by what the kubelet calls its object
// (op.go): detached from the caller's deadline, joined by retries, made of named
// steps that know their undo. States change only through package lifecycle.
// Reads take no lock and touch no disk: each pod and container publishes an
// immutable status through an atomic pointer.
//
// Lock order, outer first; none is held while another process or the network is waited for:
//
//	pod.slot        one mutating operation on a pod at a time (a channel, not a mutex)
//	  container.slot
//	    pod.mu, container.mu   the record and its journal file
//	      Engine.mu            indexes only, never held across I/O
package sandbox
