package convert

import (
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// numbers gives the names of the signals that images name by number. They are
// those of the asm-generic table, which amd64 and arm64 share; CRI's enum is
// alphabetical and its values are not signal numbers.
var numbers = map[int]string{
	1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE",
	9: "SIGKILL", 10: "SIGUSR1", 11: "SIGSEGV", 12: "SIGUSR2", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM",
	16: "SIGSTKFLT", 17: "SIGCHLD", 18: "SIGCONT", 19: "SIGSTOP", 20: "SIGTSTP", 21: "SIGTTIN", 22: "SIGTTOU",
	23: "SIGURG", 24: "SIGXCPU", 25: "SIGXFSZ", 26: "SIGVTALRM", 27: "SIGPROF", 28: "SIGWINCH", 29: "SIGIO",
	30: "SIGPWR", 31: "SIGSYS",
}

// sigrtmin is SIGRTMIN of the C libraries: the kernel's starts at 32, and they
// keep two for themselves.
const sigrtmin, sigrtmax = 34, 64

// signalName maps CRI's enum to a signal's name as engine and kernel headers
// write it: SIGNAL_SIGRTMINPLUS3 is "SIGRTMIN+3". The default is "".
func signalName(field string, s runtimeapi.Signal) (string, error) {
	if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		return "", nil
	}
	enum, ok := runtimeapi.Signal_name[int32(s)]
	if !ok {
		return "", invalid(field, "unknown signal %d; use a value of the Signal enum", int32(s))
	}
	name := strings.TrimPrefix(enum, "SIGNAL_")
	name = strings.Replace(name, "SIGRTMINPLUS", "SIGRTMIN+", 1)
	return strings.Replace(name, "SIGRTMAXMINUS", "SIGRTMAX-", 1), nil
}

// signalEnum maps the name of an effective stop signal back to CRI's enum. Image
// configs write signals in many ways ("15", "TERM", "sigterm"); an unknown one
// is the runtime's default.
func signalEnum(name string) runtimeapi.Signal {
	name = strings.ToUpper(strings.TrimSpace(name))
	if n, err := strconv.Atoi(name); err == nil {
		switch {
		case numbers[n] != "":
			name = numbers[n]
		case n >= sigrtmin && n < sigrtmin+16:
			name = "SIGRTMIN+" + strconv.Itoa(n-sigrtmin)
		case n > sigrtmin && n <= sigrtmax:
			name = "SIGRTMAX-" + strconv.Itoa(sigrtmax-n)
		}
	}
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	name = strings.Replace(name, "SIGRTMIN+", "SIGRTMINPLUS", 1)
	name = strings.Replace(name, "SIGRTMAX-", "SIGRTMAXMINUS", 1)
	switch name {
	case "SIGRTMINPLUS0":
		name = "SIGRTMIN"
	case "SIGRTMAXMINUS0":
		name = "SIGRTMAX"
	}
	return runtimeapi.Signal(runtimeapi.Signal_value["SIGNAL_"+name])
}
