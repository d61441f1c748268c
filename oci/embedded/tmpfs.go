package embedded

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// takesMode tells a tmpfs without a mode: it keeps that of the directory that it
// covers, as with runc. /dev is filled before there is a root to look at.
func (p *prepared) takesMode() bool {
	return p.fstype == "tmpfs" && !p.remount && p.dest != "/dev" && !slices.ContainsFunc(p.opts, func(o kernel.FSOption) bool { return o.Key == "mode" })
}

// takeMode makes a tmpfs with the mode of the directory that it will cover;
// where there is none yet the mode is the kernel's, 1777.
func (a *assembly) takeMode(p *prepared) error {
	at, err := kernel.OpenInRoot(a.root, p.dest, unix.O_PATH|unix.O_DIRECTORY, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		return err
	default:
		defer at.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(at.Fd()), &st); err != nil {
			return err
		}
		p.opts = append(slices.Clone(p.opts), kernel.FSOption{Key: "mode", Value: fmt.Sprintf("%o", st.Mode&0o7777)})
	}
	return a.newFS(p)
}
