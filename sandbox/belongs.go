package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// rootFile is the file in the state folder that names the root folder with the
// records of what the supervisor there holds. Compared with other records all of it
// would be on none.
const rootFile = "root"

// checkRoot returns nil when the state folder belongs to the root folder, or to none.
func checkRoot(root, state string) error {
	b, err := os.ReadFile(filepath.Join(state, rootFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && (len(b) == 0 || string(b) == root) { // empty: its write was cut short
		return nil
	}
	if err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	theirs, err1 := os.Stat(string(b))
	ours, err2 := os.Stat(root)
	if err1 == nil && err2 == nil && os.SameFile(theirs, ours) {
		return nil
	}
	return fmt.Errorf("state folder %s: belongs to the root folder %s, not to %s; use that one, or another state folder: %w", state, b, root, errdefs.ErrFailedPrecondition)
}

// claimState makes the state folder the root folder's.
func claimState(root, state string) error {
	path := filepath.Join(state, rootFile)
	if b, err := os.ReadFile(path); err == nil && string(b) == root {
		return nil
	}
	return os.WriteFile(path, []byte(root), 0o600)
}
