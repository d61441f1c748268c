// Package durable writes whole files so that a reader sees the old or the new
// content and never a mix.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/berth-runtime/berth/internal/crashpoint"
)

// WriteFile replaces path with data by rename. With sync the data is on disk
// before the name shows it, and the name before WriteFile returns; without it
// the file is consistent after a process crash but not after power loss.
func WriteFile(path string, data []byte, mode fs.FileMode, sync bool) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+temporary+"*")
	if err != nil {
		return err
	}
	fail := func(err error) error {
		return errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	crashpoint.Here("file", "made")
	if _, err := f.Write(data); err != nil {
		return fail(err)
	}
	if err := f.Chmod(mode); err != nil {
		return fail(err)
	}
	if sync {
		if err := f.Sync(); err != nil {
			return fail(err)
		}
	}
	crashpoint.Here("file", "written")
	if err := os.Rename(f.Name(), path); err != nil {
		return fail(err)
	}
	crashpoint.Here("file", "renamed")
	if err := f.Close(); err != nil {
		return err
	}
	if sync {
		return SyncDir(dir)
	}
	return nil
}

const temporary = ".tmp-"

// Clean removes what calls of WriteFile that a crash cut short have left in dir.
// Nobody may be writing there.
func Clean(dir string) error {
	entries, err := os.ReadDir(dir)
	errs := []error{err}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && strings.Contains(e.Name(), temporary) {
			errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
