package attacks

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// canaryText is in a file of the canary; no container may ever read it.
const canaryText = "CANARY-OF-THE-HOST"

// canary is a directory of the host that no container has to do with.
type canary struct {
	dir  string
	file string // a file in it
}

// newCanary makes a canary and checks at the end of the test that it is untouched.
func newCanary(t *testing.T, parent string) *canary {
	t.Helper()
	c := &canary{dir: filepath.Join(parent, "canary")}
	c.file = filepath.Join(c.dir, "file")
	err := os.MkdirAll(filepath.Join(c.dir, "sub"), 0o751)
	if err == nil {
		err = os.WriteFile(c.file, []byte(canaryText+"\n"), 0o644)
	}
	past := time.Now().Add(-time.Hour)
	for _, p := range []string{c.file, filepath.Join(c.dir, "sub"), c.dir} {
		if err == nil {
			err = os.Chtimes(p, past, past)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	before := c.state(t)
	t.Cleanup(func() {
		if after := c.state(t); after != before {
			t.Errorf("the canary changed: before\n%s\nafter\n%s", before, after)
		}
	})
	return c
}

// state describes everything in the canary.
func (c *canary) state(t *testing.T) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		content := ""
		if d.Type().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = string(b)
		}
		out = append(out, fmt.Sprintf("%s %o %d:%d dev %d:%d mtime %d.%d ctime %d.%d %q", path, st.Mode, st.Uid, st.Gid, st.Rdev, st.Nlink,
			st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec, content))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(out)
	return strings.Join(out, "\n")
}
