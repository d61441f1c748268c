package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
	"github.com/berth-runtime/berth/oci/embedded/state"
)

// event is one line that events prints.
type event struct {
	Type string        `json:"type"` // stats or oom
	ID   string        `json:"id"`
	Data *cgroup.Stats `json:"data,omitempty"`
}

// oomPoll is how often the OOM killer's counter is read.
const oomPoll = 100 * time.Millisecond

func (a *app) eventsCommand() *cobra.Command {
	interval, once := 5*time.Second, false
	c := &cobra.Command{
		Use:   "events ID",
		Short: "Print counters of a container now and then, and its OOM kills, as JSON",
		Args:  exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if interval <= 0 {
				return errors.New("--interval: duration interval must be greater than 0")
			}
			_, _, status, err := a.opened(args[0])
			if err != nil {
				return err
			}
			if status == state.Stopped {
				return fmt.Errorf("container with id %s is not running: %w", args[0], state.ErrNotRunning)
			}
			out := json.NewEncoder(cmd.OutOrStdout())
			return a.on(args[0], func(c *embedded.Container, r state.Record) error {
				if !once {
					return watch(out, c, r, interval)
				}
				s, err := c.Stats()
				if err != nil {
					return err
				}
				return out.Encode(event{"stats", args[0], s})
			})
		},
	}
	c.Flags().DurationVar(&interval, "interval", interval, "time between two prints of the counters")
	c.Flags().BoolVar(&once, "stats", false, "print the counters once")
	return c
}

// watch prints events until the container ends.
func watch(out *json.Encoder, c *embedded.Container, r state.Record, interval time.Duration) error {
	stats, oom := time.NewTicker(interval), time.NewTicker(oomPoll)
	defer stats.Stop()
	defer oom.Stop()
	seen, err := c.OOMKills()
	if err != nil {
		return err
	}
	for {
		var e event
		select {
		case <-stats.C:
			s, err := c.Stats()
			if err != nil && r.Alive() {
				return err
			}
			e = event{"stats", string(r.Saved.ID), s}
		case <-oom.C:
			n, err := c.OOMKills()
			if err == nil && n > seen {
				e = event{"oom", string(r.Saved.ID), nil}
				seen = n
			} else if err != nil && !errdefs.IsNotFound(err) && r.Alive() {
				return err
			}
		}
		alive := r.Alive()
		if e.Type == "oom" || e.Data != nil {
			if err := out.Encode(e); err != nil {
				return err
			}
		}
		if !alive {
			return nil
		}
	}
}
