package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
)

// logger is the log of a command. Callers such as containerd's shim and conmon
// read the last error from the file of --log, one JSON object a line with level,
// msg and time.
type logger struct {
	*slog.Logger
	toFile bool
}

// openLog makes the logger that the global flags ask for.
func (a *app) openLog() error {
	out := io.Writer(os.Stderr)
	if a.logFile != "" {
		f, err := os.OpenFile(a.logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return fmt.Errorf("--log: %w", err)
		}
		out, a.log.toFile = f, true
	}
	o := &slog.HandlerOptions{Level: slog.LevelInfo, ReplaceAttr: levelNames}
	if a.debug {
		o.Level = slog.LevelDebug
	}
	switch a.logFormat {
	case "", "text":
		a.log.Logger = slog.New(slog.NewTextHandler(out, o))
	case "json":
		a.log.Logger = slog.New(slog.NewJSONHandler(out, o))
	default:
		return fmt.Errorf("--log-format %q: want text or json", a.logFormat)
	}
	return nil
}

// levelNames writes the levels as readers of runc's log know them.
func levelNames(_ []string, at slog.Attr) slog.Attr {
	if at.Key != slog.LevelKey {
		return at
	}
	if l, ok := at.Value.Any().(slog.Level); ok {
		name := strings.ToLower(l.String())
		if name == "warn" {
			name = "warning"
		}
		at.Value = slog.StringValue(name)
	}
	return at
}

// report prints the error that ends the command, on one line.
func (a *app) report(err error) {
	msg := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	if a.log.toFile && a.log.Logger != nil {
		a.log.Error(msg)
	}
	fmt.Fprintln(os.Stderr, "berth-oci:", msg)
}
