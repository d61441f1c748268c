package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/embedded/state"
)

// description is a container as state and list print it.
type description struct {
	OCIVersion  string            `json:"ociVersion"`
	ID          string            `json:"id"`
	Pid         int               `json:"pid"`
	Status      state.Status      `json:"status"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Created     time.Time         `json:"created"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owner       string            `json:"owner"`
}

func describe(d *state.Dir) (description, error) {
	r, err := d.Load()
	if err != nil {
		return description{}, err
	}
	status, err := d.Status(r)
	if err != nil {
		return description{}, err
	}
	out := description{
		OCIVersion: r.OCIVersion, ID: d.ID, Pid: r.Saved.Pid, Status: status,
		Bundle: r.Saved.Bundle, Rootfs: r.Rootfs, Created: r.Created, Annotations: r.Annotations,
	}
	if status == state.Stopped {
		out.Pid = 0
	}
	return out, nil
}

func (a *app) stateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "state ID",
		Short: "Print the state of a container, as JSON",
		Args:  exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := a.states().Open(args[0])
			if err != nil {
				return err
			}
			s, err := describe(d)
			if err != nil {
				return err
			}
			s.Owner = owner(d)
			return printJSON(cmd.OutOrStdout(), s)
		},
	}
}

// owner is the name of the user that made the container.
func owner(d *state.Dir) string {
	var st unix.Stat_t
	if unix.Stat(d.Path, &st) != nil {
		return ""
	}
	if st.Uid == 0 {
		return "root"
	}
	if u, err := user.LookupId(strconv.Itoa(int(st.Uid))); err == nil {
		return u.Username
	}
	return "#" + strconv.Itoa(int(st.Uid))
}

func (a *app) listCommand() *cobra.Command {
	format, quiet := "table", false
	c := &cobra.Command{
		Use:   "list",
		Short: "List the containers below --root",
		Args:  exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("--format %q: want table or json", format)
			}
			all, err := a.list()
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			switch {
			case quiet:
				for _, s := range all {
					fmt.Fprintln(w, s.ID)
				}
				return nil
			case format == "json":
				return json.NewEncoder(w).Encode(all)
			}
			t := tabwriter.NewWriter(w, 12, 1, 3, ' ', 0)
			fmt.Fprintln(t, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER")
			for _, s := range all {
				fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\n", s.ID, s.Pid, s.Status, s.Bundle, s.Created.Format(time.RFC3339Nano), s.Owner)
			}
			return t.Flush()
		},
	}
	c.Flags().StringVarP(&format, "format", "f", "table", "table or json")
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	return c
}

// list describes all containers. One that cannot be read does not hide the others.
func (a *app) list() ([]description, error) {
	dirs, err := a.states().List()
	if errors.Is(err, os.ErrNotExist) && !a.rootSet {
		return nil, nil // nothing was made yet
	}
	if err != nil {
		return nil, fmt.Errorf("--root: %w", err)
	}
	var out []description
	for _, d := range dirs {
		s, err := describe(d)
		if errors.Is(err, state.ErrNotExist) {
			continue // being made or being deleted
		}
		if err != nil {
			a.log.Error("list", "container", d.ID, "reason", err)
			continue
		}
		s.Owner = owner(d)
		out = append(out, s)
	}
	return out, nil
}

func featuresCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "features",
		Short: "Print what the runtime supports, as JSON",
		Args:  exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return printJSON(cmd.OutOrStdout(), embedded.Features())
		},
	}
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
