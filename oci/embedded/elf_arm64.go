package embedded

// Facts of the architecture for the start program's ELF header. The alignment
// is the largest page size of an arm64 kernel.
const (
	elfMachine = 183
	elfAlign   = 65536
)
