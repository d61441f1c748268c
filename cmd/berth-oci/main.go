// The Go runtime is not to hold cgroup files open: it would do so before main, on
// the numbers of descriptors that callers pass on. One CPU more or less is no
// matter to commands that end in milliseconds.

//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// Command berth-oci is the embedded OCI runtime as a command line in the manner
// of runc: the same commands, flags, exit codes and words, so that what calls
// runc can call it instead.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci/embedded/state"
)

// exitStatus carries a container's exit code to main.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// failure is an error with an exit code other than 1.
type failure struct {
	code int
	err  error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// heapLimit is what a command may allocate before the garbage collector runs:
// nearly all end long before.
const heapLimit = 64 << 20

func main() {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(heapLimit)
	// Descriptors that the caller left open reach a container only where they are
	// passed on (--preserve-fds, LISTEN_FDS), and no hook at all.
	a := &app{given: givenFiles()}
	_ = unix.CloseRange(firstFile, ^uint(0), unix.CLOSE_RANGE_CLOEXEC) // before Linux 5.11 the start script does it
	err := a.command().Execute()
	var exit exitStatus
	var f *failure
	switch {
	case errors.As(err, &exit):
		os.Exit(int(exit))
	case errors.As(err, &f):
		a.report(err)
		os.Exit(f.code)
	case err != nil:
		a.report(err)
		os.Exit(1)
	}
}

// app is what the global flags say.
type app struct {
	given     int // descriptors after stdio that the caller left open for us
	debug     bool
	logFile   string
	logFormat string
	root      string
	rootSet   bool
	systemd   bool
	rootless  string
	log       logger
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:               "berth-oci",
		Short:             "Run containers according to the OCI runtime specification",
		Version:           version.String(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	root.SetVersionTemplate(fmt.Sprintf("berth-oci version %s\nspec: %s\ngo: %s\n", version.String(), specs.Version, runtime.Version()))
	root.CompletionOptions.HiddenDefaultCmd = true // help lists the commands of runc
	f := root.PersistentFlags()
	f.BoolVar(&a.debug, "debug", false, "log what is done")
	f.StringVar(&a.logFile, "log", "", "file to append the log to (default: stderr)")
	f.StringVar(&a.logFormat, "log-format", "text", "format of the log: text or json")
	f.StringVar(&a.root, "root", defaultRoot(), "directory for the state of containers, on a tmpfs")
	f.BoolVar(&a.systemd, "systemd-cgroup", false, `have systemd make the cgroups; linux.cgroupsPath is then "slice:prefix:name"`)
	f.StringVar(&a.rootless, "rootless", "auto", "go on where cgroups may not be made: true, false or auto")
	f.String("criu", "", "ignored")
	_ = f.MarkHidden("criu") // fails for unknown flags only
	root.AddCommand(
		a.createCommand(), a.runCommand(), a.startCommand(), a.stateCommand(), a.listCommand(), a.killCommand(),
		a.deleteCommand(), a.execCommand(), a.psCommand(), a.pauseCommand(), a.resumeCommand(), a.updateCommand(), a.eventsCommand(),
		specCommand(), featuresCommand(),
	)
	return root
}

// prepare checks the global flags and opens the log.
func (a *app) prepare(cmd *cobra.Command) error {
	if err := a.openLog(); err != nil {
		return err
	}
	if f := cmd.Flags().Lookup("root"); f != nil {
		a.rootSet = f.Changed
	}
	abs, err := filepath.Abs(a.root)
	if err != nil {
		return fmt.Errorf("--root: %w", err)
	}
	if a.root == "" || abs == "/" {
		return errors.New(`--root: want a directory of its own, not "/"`)
	}
	a.root = abs
	switch strings.ToLower(a.rootless) {
	case "", "auto":
	default:
		if _, err := strconv.ParseBool(a.rootless); err != nil {
			return fmt.Errorf("--rootless %q: want true, false or auto", a.rootless)
		}
	}
	return nil
}

// defaultRoot is /run/berth-oci for root, and a directory of the user's own otherwise.
func defaultRoot() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" && (os.Geteuid() != 0 || kernel.InUserNamespace() && os.Getenv("USER") != "root") {
		return filepath.Join(dir, "berth-oci")
	}
	return "/run/berth-oci"
}

// isRootless reports whether a container may go without a cgroup that we may not make.
func (a *app) isRootless() bool {
	if b, err := strconv.ParseBool(a.rootless); err == nil {
		return b
	}
	return os.Geteuid() != 0 || kernel.InUserNamespace()
}

// states is where the containers' directories are. Below XDG_RUNTIME_DIR the
// sticky bit keeps what is old from being cleaned away.
func (a *app) states() state.Root {
	if !a.rootSet && a.root != "/run/berth-oci" {
		if os.MkdirAll(a.root, 0o700) == nil {
			_ = os.Chmod(a.root, 0o700|os.ModeSticky) // of use only
		}
	}
	return state.Root(a.root)
}

// exactly is the check of commands with n arguments.
func exactly(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return fmt.Errorf("%q requires exactly %d argument(s); see berth-oci %s --help", cmd.Name(), n, cmd.Name())
		}
		return nil
	}
}

// between is the check of commands with low to high arguments; high < 0 is no bound.
func between(low, high int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < low:
			return fmt.Errorf("%q requires a minimum of %d argument(s); see berth-oci %s --help", cmd.Name(), low, cmd.Name())
		case high >= 0 && len(args) > high:
			return fmt.Errorf("%q requires a maximum of %d argument(s); see berth-oci %s --help", cmd.Name(), high, cmd.Name())
		}
		return nil
	}
}
