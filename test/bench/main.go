// Command bench measures a CRI socket, whichever runtime is behind it: the pod
// lifecycle call by call, exec, lists, memory and CPU per idle pod, image pulls
// and log throughput. It serves the images that it runs from a registry of its
// own on loopback, so it needs no network.
//
//	bench --endpoint /run/berth/berth.sock --match berthd,berth-supervisor --json out.json
//	bench table berth-1.json containerd-1.json berth-2.json containerd-2.json
//	bench registry 127.0.0.1:5999
//	bench reap containerd --config /tmp/containerd.toml
//	bench oci --hide-unified berth=/usr/local/bin/berth-oci runc=/usr/sbin/runc crun=/usr/bin/crun
//
// Latencies are what a client on the socket sees, gRPC included.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/berth-runtime/berth/test/testimage"
)

type options struct {
	endpoint, name, image, command, exec string
	registry, scratch, json              string
	pull, only, match, within, pids      string
	cgroupParent, seccomp, restart       string
	n, workers, pods, execs, pulls       int
	between, window, timeout             time.Duration
	logMiB                               int
}

func flags(args []string) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.StringVar(&o.endpoint, "endpoint", "/run/berth/berth.sock", "CRI socket, with or without unix://")
	f.StringVar(&o.name, "name", "", "name of the runtime in the results (default: what Version says)")
	f.IntVar(&o.n, "n", 50, "pod lives to measure one at a time, and as many again with --workers")
	f.IntVar(&o.workers, "workers", 4, "clients at once in the parallel part")
	f.IntVar(&o.pods, "pods", 50, "idle pods of one container each, for lists, memory and idle CPU")
	f.IntVar(&o.execs, "execs", 200, "ExecSync calls to measure")
	f.IntVar(&o.pulls, "pulls", 3, "pulls of each image, removed in between")
	f.IntVar(&o.logMiB, "log-mib", 128, "MiB of 100-byte lines that the log part prints")
	f.DurationVar(&o.between, "between", 0, "rest between two pod lives that are measured one at a time")
	f.DurationVar(&o.window, "window", 20*time.Second, "how long idle CPU is watched")
	f.DurationVar(&o.timeout, "timeout", 2*time.Minute, "deadline of one call")
	f.StringVar(&o.image, "image", "", "image to run instead of the bench's own (then --command and --exec too)")
	f.StringVar(&o.command, "command", "/tiny/pause", "command of a container, split at spaces")
	f.StringVar(&o.exec, "exec", "/tiny/true", "command of an ExecSync, split at spaces")
	f.StringVar(&o.pull, "pull", "", "images to pull, separated by commas, instead of the bench's own of 200 MB in 12,000 files (gzip, then zstd)")
	f.StringVar(&o.registry, "registry", "127.0.0.1:0", "address of the bench's own registry")
	f.StringVar(&o.scratch, "scratch", "", "folder for pod logs (default: a new one under $TMPDIR)")
	f.StringVar(&o.json, "json", "", "file for the results as JSON")
	f.StringVar(&o.only, "only", "lifecycle,parallel,exec,scale,pull,logs", "parts to run; and restart, which needs --restart")
	f.StringVar(&o.match, "match", "", "the runtime's own processes by the name or path of their executable, separated by commas")
	f.StringVar(&o.within, "within", "", "of those of --match, only the ones with this text in their command line or their executable's path")
	f.StringVar(&o.pids, "pids", "", "the runtime's own processes by number, separated by commas, instead of --match")
	f.StringVar(&o.restart, "restart", "", "for the part restart: the daemon's process, among those of --match, by the name of its executable; it is killed with SIGKILL")
	f.StringVar(&o.cgroupParent, "cgroup-parent", "/berth-bench", "cgroup under which each pod gets its own, as a kubelet makes them; a .slice or nothing is handed on as it is")
	f.StringVar(&o.seccomp, "seccomp", "runtime-default", "seccomp profile of the containers: runtime-default or unconfined")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("argument %q: want flags only, or one of table, registry, oci, reap first", f.Arg(0))
	}
	if o.n < 1 || o.workers < 1 || o.pods < 0 || o.execs < 1 || o.pulls < 1 {
		return nil, errors.New("--n, --workers, --execs and --pulls: want at least 1, and --pods at least 0")
	}
	if o.seccomp != "runtime-default" && o.seccomp != "unconfined" {
		return nil, fmt.Errorf("--seccomp %q: want runtime-default or unconfined", o.seccomp)
	}
	return o, nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "table":
		err = table(os.Stdout, os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "registry":
		err = serve(ctx, os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "oci":
		err = benchOCI(ctx, os.Stdout, os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "reap":
		err = reap(os.Args[2:])
	default:
		var o *options
		if o, err = flags(os.Args[1:]); err == nil {
			err = run(ctx, o)
		}
	}
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// serve keeps a registry with the pause image up until it is told to end: for a
// runtime that wants one in its configuration before it starts.
func serve(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: bench registry ADDRESS")
	}
	reg, err := testimage.Serve(args[0], nil)
	if err != nil {
		return err
	}
	img, err := testimage.Pause("")
	if err != nil {
		return errors.Join(err, reg.Close())
	}
	ref, err := reg.Push(ctx, "pause:1", img)
	if err != nil {
		return errors.Join(err, reg.Close())
	}
	fmt.Println(ref)
	<-ctx.Done()
	return reg.Close()
}

// bench is one run against one socket.
type bench struct {
	*client
	result  *result
	watched *processes
	reg     *testimage.Registry
}

func run(ctx context.Context, o *options) (err error) {
	parts, err := parseParts(o.only)
	if err != nil {
		return err
	}
	w, err := newProcesses(o.match, o.within, o.pids)
	if err != nil {
		return err
	}
	if o.scratch == "" {
		if o.scratch, err = os.MkdirTemp("", "berth-bench-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.scratch)
	}
	if o.scratch, err = filepath.Abs(o.scratch); err != nil {
		return err
	}
	c, err := dial(ctx, o)
	if err != nil {
		return err
	}
	defer c.close()
	b := &bench{client: c, result: newResult(o, c.version), watched: w}
	defer func() { err = errors.Join(err, b.cleanUp()) }()

	if b.reg, err = testimage.Serve(o.registry, nil); err != nil {
		return err
	}
	defer b.reg.Close()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, p := range parts {
		start := time.Now()
		if err := p.run(b, ctx); err != nil {
			return fmt.Errorf("part %s: %w", p.name, err)
		}
		fmt.Fprintf(os.Stderr, "%s: %s took %.1f s\n", b.result.Name, p.name, time.Since(start).Seconds())
	}
	b.result.print(os.Stdout)
	if o.json != "" {
		return b.result.save(o.json)
	}
	return nil
}

type part struct {
	name string
	run  func(*bench, context.Context) error
}

// Memory comes first, while the runtime has done little else: what it frees
// later it need not give back.
var parts = []part{
	{"scale", (*bench).scale}, {"lifecycle", (*bench).lifecycle}, {"parallel", (*bench).parallel},
	{"exec", (*bench).execSync}, {"logs", (*bench).logs}, {"pull", (*bench).pullAll},
	{"restart", (*bench).restart},
}

func parseParts(only string) ([]part, error) {
	want := map[string]bool{}
	for n := range strings.SplitSeq(only, ",") {
		want[strings.TrimSpace(n)] = true
	}
	var chosen []part
	for _, p := range parts {
		if want[p.name] {
			chosen = append(chosen, p)
			delete(want, p.name)
		}
	}
	for n := range want {
		return nil, fmt.Errorf("--only %q: no such part; there are lifecycle, parallel, exec, scale, pull, logs and restart", n)
	}
	return chosen, nil
}

// prepare puts the image to run into the runtime and lives one life unmeasured.
func (b *bench) prepare(ctx context.Context) error {
	if b.o.image == "" {
		img, err := testimage.Program(ctx, "", testimage.Gzip)
		if err != nil {
			return err
		}
		if b.o.image, err = b.reg.Push(ctx, "bench:1", img); err != nil {
			return err
		}
		b.ownImages = append(b.ownImages, b.o.image)
	}
	if _, err := b.pullImage(ctx, b.o.image); err != nil {
		return fmt.Errorf("pull %s: %w", b.o.image, err)
	}
	return b.life(ctx, "warm", nil)
}
