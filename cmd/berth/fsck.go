package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/cni/builtin"
	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/dirlock"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/oci/supervisor/client"
	"github.com/berth-runtime/berth/sandbox"
)

// Exit codes of fsck.
const (
	fsckLeft    exitCode = 1 // leftovers remain
	fsckCannot  exitCode = 2 // it could not look, or not everywhere
	fsckRunning exitCode = 3 // the daemon runs
)

// fsckSettle is how long the kernel has for what is on its way out, such as the
// links of a daemon that has just ended.
const fsckSettle = 2 * time.Second

// fsckPasses bounds the looks after a repair: what was inside a leftover, or was
// held by it, is found once that is gone.
const fsckPasses = 4

// fsckFinding is a leftover and what became of it.
type fsckFinding struct {
	leftover.Finding
	Removed bool   `json:"removed"`
	Error   string `json:"error,omitempty"`
}

func (f *fsckFinding) same(g leftover.Finding) bool { return f.Kind == g.Kind && f.Name == g.Name }

// fsckReport is what fsck prints.
type fsckReport struct {
	Findings []fsckFinding `json:"findings"`
	// Unseen says where could not be looked.
	Unseen string `json:"unseen,omitempty"`
}

func fsckCommand(e *env) *cobra.Command {
	var file string
	var repair bool
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "While no daemon runs: tell what belongs to no pod, container or image, and remove it",
		Long: `Compare what is on this node (processes, cgroups, mounts, network namespaces, links, addresses, published
ports, layers, folders, and what the supervisor holds) with the daemon's records, and name what is on none.
Nothing is changed without --repair. A running daemon does the same by itself each minute.

Exit codes: 0 nothing is left over, 1 something is, 2 it could not be looked everywhere, 3 the daemon runs.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			set := map[string]string{}
			for _, key := range []string{"root", "state"} {
				if f := cmd.Flags().Lookup(key); f.Changed {
					set[key] = f.Value.String()
				}
			}
			cfg, err := config.Load(file, !cmd.Flags().Changed("config"), set)
			if err == nil {
				return e.fsck(cmd.Context(), cfg.Config, repair)
			}
			fmt.Fprintln(e.errOut, "berth:", err)
			return fsckCannot
		},
	}
	defaults := config.Default()
	cmd.Flags().StringVar(&file, "config", config.DefaultFile, "the daemon's configuration file; the default one may be absent")
	cmd.Flags().String("root", defaults.Root, "the daemon's root directory")
	cmd.Flags().String("state", defaults.State, "the daemon's state directory")
	cmd.Flags().BoolVar(&repair, "repair", false, "remove what is found, where that it is Berth's and nobody's is certain")
	return cmd
}

func (e *env) fsck(ctx context.Context, cfg *config.Config, repair bool) error {
	unlock, err := lockNode(cfg, repair)
	if err != nil {
		if held := (*dirlock.HeldError)(nil); errors.As(err, &held) {
			fmt.Fprintf(e.errOut, "berth: berthd runs on %s (pid %s) and looks for leftovers itself: see its log and its metrics berth_leftovers_*, or stop it first (containers go on)\n", held.Dir, held.Holder)
			return fsckRunning
		}
		fmt.Fprintln(e.errOut, "berth:", err)
		return fsckCannot
	}
	defer unlock()
	look, done, err := offline(ctx, cfg)
	if err != nil {
		fmt.Fprintln(e.errOut, "berth:", err)
		return fsckCannot
	}
	defer done()
	found, unseen := twice(ctx, look)
	r := fsckReport{Findings: []fsckFinding{}}
	for _, f := range found {
		r.Findings = append(r.Findings, fsckFinding{Finding: f})
	}
	if repair {
		unseen = r.repair(ctx, look, unseen)
	}
	left := 0
	for _, f := range r.Findings {
		if !f.Removed {
			left++
		}
	}
	if unseen != nil {
		r.Unseen = unseen.Error()
	}
	if err := e.printReport(r, left, repair); err != nil {
		return err
	}
	switch {
	case unseen != nil:
		return fsckCannot
	case left > 0:
		return fsckLeft
	}
	return nil
}

// lockNode keeps a daemon from working on the directories meanwhile.
func lockNode(cfg *config.Config, repair bool) (unlock func(), err error) {
	var locks []*os.File
	unlock = func() {
		for _, f := range locks {
			_ = f.Close()
		}
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("fsck: this needs root; run it with sudo")
	}
	dirs := []string{cfg.State}
	if cfg.Root != cfg.State {
		dirs = append(dirs, cfg.Root)
	}
	for _, dir := range dirs {
		st, err := os.Stat(dir)
		if err == nil && !st.IsDir() {
			err = unix.ENOTDIR
		}
		if err != nil {
			unlock()
			return nil, fmt.Errorf("%w; name the daemon's directories with --root and --state, or its configuration with --config", err)
		}
		take := dirlock.Hold
		if repair {
			take = dirlock.Take
		}
		f, err := take(dir)
		if err != nil {
			unlock()
			return nil, err
		}
		if f != nil {
			locks = append(locks, f)
		}
	}
	return unlock, nil
}

// looker looks once.
type looker func(context.Context) ([]leftover.Finding, error)

// offline prepares to look at a node without a daemon.
func offline(ctx context.Context, cfg *config.Config) (look looker, done func(), err error) {
	o := sandbox.Offline{
		Root: cfg.Root, State: cfg.State,
		Network: func(use cni.InUse) ([]leftover.Finding, error) {
			own, err1 := builtin.Look(filepath.Join(cfg.State, "network"), nil, use)
			plugins, err2 := cni.Look(filepath.Join(cfg.State, "cni"), use)
			return slices.Concat(own, plugins), errors.Join(err1, err2)
		},
		Images: func(used func(string) bool) ([]leftover.Finding, error) {
			return imageservice.Look(filepath.Join(cfg.Root, "images"), used)
		},
	}
	done = func() {}
	s, err := client.Open(ctx, client.Config{StateDir: cfg.State}) // without a binary: it starts none
	switch {
	case err == nil:
		o.Supervisor, done = s, func() { _ = s.Close() }
	case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED):
		return nil, nil, err
	}
	return o.Leftovers, done, nil
}

// twice looks, and looks again when something was found: what is gone then was on
// its way out.
func twice(ctx context.Context, look looker) ([]leftover.Finding, error) {
	var seen leftover.Sightings
	found, err := look(ctx)
	seen.Seen(found, time.Now())
	if len(found) == 0 {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(fsckSettle):
	}
	found, err = look(ctx)
	found, _, _ = seen.Seen(found, time.Now())
	return found, err
}

// repair removes what was found and what is found after that. In the end everything
// is looked for once more: what is still there was not removed. The result is the
// error of the last look, which is unseen when there was nothing to remove.
func (r *fsckReport) repair(ctx context.Context, look looker, unseen error) error {
	for pass := 0; ; pass++ {
		tried := false
		for i := range r.Findings {
			f := &r.Findings[i]
			if f.Remove == nil || f.Removed || pass == fsckPasses {
				continue
			}
			tried = true
			f.Removed, f.Error = true, ""
			if err := f.Remove(ctx); err != nil {
				f.Removed, f.Error = false, err.Error()
			}
		}
		if !tried {
			return unseen
		}
		var found []leftover.Finding
		if found, unseen = twice(ctx, look); unseen != nil {
			return unseen
		}
		for i := range r.Findings { // what went with another leftover counts as removed
			f := &r.Findings[i]
			f.Removed = !slices.ContainsFunc(found, f.same)
		}
		for _, f := range found {
			if !slices.ContainsFunc(r.Findings, func(g fsckFinding) bool { return g.same(f) }) {
				r.Findings = append(r.Findings, fsckFinding{Finding: f})
			}
		}
		if len(found) == 0 {
			return nil
		}
	}
}

func (e *env) printReport(r fsckReport, left int, repair bool) error {
	if done, err := e.print(r); done {
		return err
	}
	rows := [][]string{}
	for _, f := range r.Findings {
		verdict, text := "left", f.Detail
		if !f.Since.IsZero() {
			text += ", " + age(e.now().Sub(f.Since)) + " old"
		}
		switch {
		case f.Removed:
			verdict = "removed"
		case f.Error != "":
			verdict, text = "failed", text+"; "+strings.ReplaceAll(f.Error, "\n", ", ")
		case f.Remedy != "":
			text += "; " + f.Remedy
		case f.Remove != nil && !repair:
			text += "; fsck --repair removes it"
		}
		rows = append(rows, []string{verdict, string(f.Kind), f.Name, text})
	}
	if err := table(e.out, rows); err != nil {
		return err
	}
	summary := "nothing is left over"
	if n := len(r.Findings); n > 0 {
		summary = fmt.Sprintf("%d found, %d removed, %d left", n, n-left, left)
	}
	if r.Unseen != "" {
		summary += "; could not look everywhere: " + strings.ReplaceAll(r.Unseen, "\n", ", ")
	}
	_, err := fmt.Fprintln(e.out, summary)
	return err
}
