// Package sandbox is the engine: it runs pod sandboxes, containers and execs
// through the interfaces of ports.go, one file per verb.
//
// Every mutating call is an operation keyed by what the kubelet calls its object
// (op.go): detached from the caller's deadline, joined by retries, made of named
// steps that know their undo. States change only through package lifecycle.
// Reads take no lock and touch no disk: each pod and container publishes an
// immutable status through an atomic pointer.
//
// Lock order, outer first (locks.go; the tests check it). Slots are channels and may
// be held while another process or the network is waited for; the others may not:
//
//	pod.slot        one mutating operation on a pod at a time
//	  container.slot
//	    pod.mu, container.mu   the record and its journal file; one of them at a time
//	      Engine.mu            the writers of the indexes, never held across I/O
//	        ops.mu, ending.mu, usageTable.mu   for moments, with nothing inside
package sandbox
