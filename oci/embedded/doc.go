// Package embedded is Berth's own OCI runtime: runtime-spec 1.3 for Linux.
//
// Create does all that needs no process: the cgroup, the namespaces and the
// complete mount namespace of the container, built by a thread of this process
// that enters it and is thrown away. Start compiles what is left (join, mount
// /proc, identity, execve) into a script of system calls, writes it out as a
// tiny static ELF program in a sealed memfd and runs that with fork-exec: the
// child has an address space of its own with no Go runtime, no path leads to
// it, and an error comes back as the name of the call that failed.
//
// The mount namespace is a copy of one prepared namespace that holds a single
// empty tmpfs: no host mount is ever in it, and its cost does not grow with the
// number of mounts of the host. Three kinds of containers have it otherwise
// (docs/adr/0009): those with hooks that look for the host's files around the
// root, those in a user namespace, and those that share a mount namespace.
//
// A Go process has many threads and can neither enter nor make a user namespace.
// Scripts can: a holder is a process that was made for its namespaces, which
// are opened and outlive it (hold); the first process of a PID namespace that
// belongs to a user namespace is forked by the script itself (forkInside).
//
// A script may wait: for hooks, for the listener of a seccomp filter, at the gate
// of a created container (Prepare, Release). What it waits for is a byte; the end
// of the pipe, when the runtime has died, ends it.
//
// Files: plan, check, mount, sysctl, idmap: the spec, checked and as values; no
// system call. runtime, assemble, sources, namespaces, root, dev, protect: Create.
// start, exec, created, hooks, enter, process: what the scripts do. script, elf,
// launch, interp_*: what a script is.
package embedded
