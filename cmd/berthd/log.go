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
	h := slog.NewTextHandler(w, &slog.HandlerOptions{Level: l.level})
	slog.SetDefault(slog.New(h))
	klog.SetSlogLogger(slog.New(h))
	return nil
}
