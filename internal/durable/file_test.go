package durable

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCleanRemovesWhatWasCutShort(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"record", ".hidden", "other.tmp-1", ".record.tmp-123"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Clean(dir); err != nil {
		t.Fatal(err)
	}
	for name, stays := range map[string]bool{"record": true, ".hidden": true, "other.tmp-1": true, ".record.tmp-123": false} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != stays {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Clean(filepath.Join(dir, "missing")); err == nil {
		t.Error("a missing folder is no error")
	}
}
