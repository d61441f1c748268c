// Package embedded is Berth's own OCI runtime.
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
// number of mounts of the host.
package embedded
