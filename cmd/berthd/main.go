// Command berthd is the node runtime's daemon: it serves CRI v1 on a unix
// socket. Containers belong to berth-supervisor and go on without it.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/version"
)

func main() {
	crashpoint.Arm(crashpoint.Daemon)
	if err := command().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "berthd:", err)
		os.Exit(1)
	}
}

// flags of the daemon; each sets the key of the configuration of the same name.
var flags = []struct{ key, usage string }{
	{"root", "directory of images and writable layers; survives reboots"},
	{"state", "directory of records and sockets; dies with the boot"},
	{"socket", "unix socket that CRI is served on"},
	{"cni_conf_dir", "directory of CNI configurations; without one in it, pods are on the built-in network"},
	{"cni_bin_dir", "directory of CNI plugins"},
	{"registry_config_dir", "directory of <host>/hosts.toml registry configurations"},
	{"log_level", "error, warn, info, debug or trace"},
	{"metrics_address", "host:port of the Prometheus endpoint; none when empty"},
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "berthd",
		Short:         "Kubernetes node runtime",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	var file string
	root.PersistentFlags().StringVar(&file, "config", config.DefaultFile, "configuration file (TOML); the default one may be absent")
	defaults := config.Default().Map()
	for _, f := range flags {
		root.PersistentFlags().String(config.FlagName(f.key), fmt.Sprint(defaults[f.key]), f.usage)
	}
	load := func(cmd *cobra.Command) (*config.Loaded, error) {
		set := map[string]string{}
		for _, f := range flags {
			if flag := cmd.Flags().Lookup(config.FlagName(f.key)); flag.Changed {
				set[f.key] = flag.Value.String()
			}
		}
		return config.Load(file, !cmd.Flags().Changed("config"), set)
	}
	root.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(cmd)
		if err != nil {
			return err
		}
		if err := setUpLog(os.Stderr, cfg.LogLevel); err != nil {
			return err
		}
		tuneMemory()
		return run(cmd.Context(), cfg.Config, open)
	}
	root.AddCommand(&cobra.Command{
		Use:   "config",
		Short: "Print the effective configuration and where each value comes from",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			return cfg.Write(cmd.OutOrStdout())
		},
	}, &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "berthd", version.String())
			return err
		},
	})
	return root
}
