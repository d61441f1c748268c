package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/config"
)

func TestLogLevels(t *testing.T) {
	t.Cleanup(func() { _ = setUpLog(&bytes.Buffer{}, "error") })
	for i, level := range config.LogLevels {
		var b bytes.Buffer
		if err := setUpLog(&b, level); err != nil {
			t.Fatal(err)
		}
		klog.ErrorS(nil, "is error")
		slog.Warn("is warn") // klog has no structured warnings; packages without klog use slog
		klog.InfoS("is info")
		klog.V(2).InfoS("is debug")
		klog.V(5).InfoS("is trace")
		for j, other := range config.LogLevels {
			if got := strings.Contains(b.String(), "is "+other); got != (j <= i) {
				t.Errorf("level %s: record of level %s written: %t\n%s", level, other, got, b.String())
			}
		}
		if level == "trace" && (!strings.Contains(b.String(), "level=TRACE") || !strings.Contains(b.String(), "level=DEBUG")) {
			t.Errorf("levels are not named:\n%s", b.String())
		}
	}
}
