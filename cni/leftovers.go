package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
)

// Leftovers implements Network: what the default network finds, attachments by
// plugins of pods that are gone, and pins without an attachment.
func (s *Selector) Leftovers(ctx context.Context, use InUse) ([]leftover.Finding, error) {
	var out []leftover.Finding
	var errs []error
	if s.cfg.Default != nil {
		found, err := s.cfg.Default.Leftovers(ctx, use)
		out, errs = found, append(errs, err)
	}
	found, err := look(s.cfg.StateDir, use, s.isBusy)
	for i := range found {
		pod := id.Pod(filepath.Base(found[i].Name))
		remove := found[i].Remove
		found[i].Remove = func(ctx context.Context) error {
			if use.Pod(pod) || s.isBusy(pod) {
				return nil
			}
			if remove == nil { // an attachment: its plugins are asked
				return s.Detach(ctx, Pod{ID: pod}, Attachment{Network: PluginNetwork}, nil)
			}
			defer s.begin(pod)()
			return remove(ctx)
		}
	}
	return append(out, found...), errors.Join(append(errs, err)...)
}

// Look finds what Leftovers finds of the plugins' attachments while no daemon runs.
// It changes nothing and calls no plugin.
func Look(stateDir string, use InUse) ([]leftover.Finding, error) {
	found, err := look(stateDir, use, func(id.Pod) bool { return false })
	for i := range found {
		if found[i].Kind == leftover.Address {
			found[i].Remedy = "start berthd: it has the plugins take the attachment back"
		}
	}
	return found, err
}

// look lists attachments, which only a plugin can take back (so they have no
// Remove), and pins without one.
func look(stateDir string, use InUse, busy func(id.Pod) bool) ([]leftover.Finding, error) {
	s := &Selector{cfg: Config{StateDir: stateDir}, pins: pins{filepath.Join(stateDir, "netns")}}
	pinned, err := os.ReadDir(s.pins.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("pins of network namespaces: %w", err)
	}
	pods, err := s.journalled()
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return nil, err
	}
	attached := map[id.Pod]bool{}
	var out []leftover.Finding
	for _, pod := range pods {
		attached[pod] = true
		if use.Pod(pod) || busy(pod) {
			continue
		}
		out = append(out, leftover.Finding{Kind: leftover.Address, Name: string(pod),
			Detail: "CNI attachment of a pod sandbox that is not on record"})
	}
	for _, e := range pinned {
		pod := id.Pod(e.Name())
		if id.Valid(e.Name()) != nil || attached[pod] || use.Pod(pod) || busy(pod) {
			continue
		}
		// The journal is written before the pin: one that came after the list was read.
		if _, err := os.Stat(s.journalPath(pod)); err == nil {
			continue
		}
		out = append(out, leftover.Finding{Kind: leftover.NetNS, Name: s.pins.path(pod), Detail: "network namespace pinned for a pod sandbox that is not on record",
			Remove: func(context.Context) error { return s.pins.remove(pod) }})
	}
	return out, nil
}
