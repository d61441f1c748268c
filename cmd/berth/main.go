// Command berth is the operator's command line. It talks CRI to the daemon's
// socket and changes nothing that CRI cannot; but for fsck, which works without a daemon.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	err := command().ExecuteContext(ctx)
	var code exitCode
	switch {
	case errors.As(err, &code):
		os.Exit(int(code))
	case err != nil:
		fmt.Fprintln(os.Stderr, "berth:", plain(err))
		os.Exit(1)
	}
}

// exitCode ends the program with a code and no message.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// plain is a daemon's error without gRPC's wrapping.
func plain(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

// env is what the commands share: the flags and the connection.
type env struct {
	socket string
	output string
	out    io.Writer
	errOut io.Writer
	conn   *grpc.ClientConn
	now    func() time.Time
}

func (e *env) runtime() runtimeapi.RuntimeServiceClient {
	return runtimeapi.NewRuntimeServiceClient(e.conn)
}
func (e *env) images() runtimeapi.ImageServiceClient { return runtimeapi.NewImageServiceClient(e.conn) }

func command() *cobra.Command {
	e := &env{now: time.Now}
	root := &cobra.Command{
		Use:           "berth",
		Short:         "See and use the pods, containers and images of this node",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			e.out, e.errOut = cmd.OutOrStdout(), cmd.ErrOrStderr()
			if e.output != "table" && e.output != "json" {
				return fmt.Errorf("--output %q: use table or json", e.output)
			}
			return e.connect()
		},
	}
	socket := config.DefaultSocket
	if s := os.Getenv("BERTH_SOCKET"); s != "" {
		socket = s
	}
	root.PersistentFlags().StringVar(&e.socket, "socket", socket, "CRI socket of the daemon (environment: BERTH_SOCKET)")
	root.PersistentFlags().StringVarP(&e.output, "output", "o", "table", "table for people, json for scripts")
	root.AddCommand(psCommand(e), imagesCommand(e), pullCommand(e), logsCommand(e), execCommand(e), inspectCommand(e), versionCommand(e), checkCommand(e), fsckCommand(e))
	return root
}

// connect prepares the connection; the first call dials.
func (e *env) connect() error {
	conn, err := grpc.NewClient("unix://"+e.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)), grpc.WithUnaryInterceptor(e.explain))
	e.conn = conn
	return err
}

// explain says in a person's words why no daemon can be reached.
func (e *env) explain(ctx context.Context, method string, q, r any, conn *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := call(ctx, method, q, r, conn, opts...)
	if status.Code(err) != codes.Unavailable {
		return err
	}
	var d net.Dialer
	c, why := d.DialContext(ctx, "unix", e.socket)
	if why == nil { // the daemon is there: it was its own answer
		_ = c.Close()
		return err
	}
	remedy := "start berthd, or name the socket of the one that runs with --socket or BERTH_SOCKET"
	if errors.Is(why, os.ErrPermission) {
		remedy = "run as root"
	}
	var cause unix.Errno
	if errors.As(why, &cause) {
		why = cause
	}
	return fmt.Errorf("no daemon can be reached on %s (%w); %s", e.socket, why, remedy)
}

// print writes v as JSON when that was asked for, and reports whether it did.
func (e *env) print(v any) (bool, error) {
	if e.output != "json" {
		return false, nil
	}
	enc := json.NewEncoder(e.out)
	enc.SetIndent("", "  ")
	return true, enc.Encode(v)
}

func versionCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this program and of the daemon",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := struct {
				Client  string `json:"client"`
				Runtime string `json:"runtime,omitempty"`
				Version string `json:"version,omitempty"`
				API     string `json:"api,omitempty"`
			}{Client: version.String()}
			v, err := e.runtime().Version(cmd.Context(), &runtimeapi.VersionRequest{})
			if err == nil {
				out.Runtime, out.Version, out.API = v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion
			}
			if done, perr := e.print(out); done {
				return errors.Join(perr, err)
			}
			fmt.Fprintf(e.out, "berth    %s\n", out.Client)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(e.out, "%-8s %s (CRI %s, %s)\n", "daemon", out.Version, out.API, out.Runtime)
			return err
		},
	}
}
