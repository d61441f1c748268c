package main

import (
	"flag"
	"io"
	"log/slog"

	"k8s.io/klog/v2"
)

// levels gives for each log_level the least severe record that is written and
// klog's verbosity: 2 logs every change, 5 every request.
var levels = map[string]struct {
	level     slog.Level
	verbosity string
}{
	"error": {slog.LevelError, "0"},
	"warn":  {slog.LevelWarn, "0"},
	"info":  {slog.LevelInfo, "0"},
	"debug": {slog.Level(-4), "4"},
	"trace": {slog.Level(-9), "9"},
}

// setUpLog makes klog write structured lines of the level's severity to w.
func setUpLog(w io.Writer, level string) error {
	l := levels[level]
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	if err := fs.Set("v", l.verbosity); err != nil {
		return err
	}
	h := slog.NewTextHandler(w, &slog.HandlerOptions{Level: l.level, ReplaceAttr: nameLevel})
	slog.SetDefault(slog.New(h))
	klog.SetSlogLogger(slog.New(h))
	return nil
}

// nameLevel writes klog's verbosities, which slog shows as DEBUG+2, by the names
// of log_level.
func nameLevel(groups []string, a slog.Attr) slog.Attr {
	level, ok := a.Value.Any().(slog.Level)
	if len(groups) > 0 || a.Key != slog.LevelKey || !ok || level >= slog.LevelInfo {
		return a
	}
	if level >= slog.LevelDebug {
		return slog.String(slog.LevelKey, "DEBUG")
	}
	return slog.String(slog.LevelKey, "TRACE")
}
