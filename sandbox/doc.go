// Package sandbox is the engine: it runs pod sandboxes, containers and execs
// through the interfaces of ports.go.
package sandbox
