// Command berth-oci is the embedded OCI runtime as a command line in the manner
// of runc.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"

	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci/embedded"
)

func main() {
	err := command().Execute()
	var exit exitStatus
	switch {
	case errors.As(err, &exit):
		os.Exit(int(exit))
	case err != nil:
		fmt.Fprintln(os.Stderr, "berth-oci:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "berth-oci",
		Short:         "Run containers according to the OCI runtime specification",
		Version:       version.String(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetVersionTemplate(fmt.Sprintf("berth-oci version %s\nspec: %s\n", version.String(), specs.Version))
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(runCommand(), specCommand(), featuresCommand())
	return root
}

func featuresCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "features",
		Short: "Print what the runtime supports, as JSON",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return printJSON(cmd.OutOrStdout(), embedded.Features())
		},
	}
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "\t")
	return e.Encode(v)
}
