package embedded

// Facts of the architecture for the start program's ELF header.
const (
	elfMachine = 0x3e
	elfAlign   = 4096
)
