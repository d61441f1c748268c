// Package harness runs a real berthd on scratch folders and talks CRI to it,
// for the demo and the end-to-end suites.
package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/pace"
)

// Daemon is a berthd process and the scratch folders that it works on.
type Daemon struct {
	Dir     string // scratch folder: everything below it is this daemon's
	Socket  string
	Runtime cri.RuntimeServiceClient
	Images  cri.ImageServiceClient
	// Env is added to the environment of the daemon at each Start.
	Env []string

	bin  string
	args []string
	cmd  *exec.Cmd
	done chan error
	conn *grpc.ClientConn
}

// Bin finds the folder with Berth's built binaries: bin/ of the checkout.
func Bin() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			bin := filepath.Join(dir, "bin")
			if _, err := os.Stat(filepath.Join(bin, "berthd")); err != nil {
				return "", fmt.Errorf("no berthd in %s: run `make build` first", bin)
			}
			return bin, nil
		}
	}
	return "", errors.New("no go.mod above the working directory")
}

// New prepares a daemon on dir (an existing, empty folder); Start runs it.
// args are added to berthd's flags.
func New(dir string, args ...string) (*Daemon, error) {
	bin, err := Bin()
	if err != nil {
		return nil, err
	}
	d := &Daemon{Dir: dir, Socket: filepath.Join(dir, "run", "berth.sock"), bin: bin}
	for _, sub := range []string{"root", "run", "certs.d", "net.d", "cni-bin", "log"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	if err := d.Config(""); err != nil { // no defaults of the machine's own configuration
		return nil, err
	}
	d.args = append([]string{
		"--config", filepath.Join(dir, "config.toml"),
		"--root", filepath.Join(dir, "root"), "--state", filepath.Join(dir, "run"), "--socket", d.Socket,
		"--cni-conf-dir", filepath.Join(dir, "net.d"), "--cni-bin-dir", filepath.Join(dir, "cni-bin"),
		"--registry-config-dir", filepath.Join(dir, "certs.d"),
	}, args...)
	conn, err := grpc.NewClient("unix://"+d.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		return nil, err
	}
	d.conn, d.Runtime, d.Images = conn, cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)
	return d, nil
}

// Config replaces the daemon's configuration file; it counts at the next Start.
func (d *Daemon) Config(toml string) error {
	return os.WriteFile(filepath.Join(d.Dir, "config.toml"), []byte(toml), 0o600)
}

// Start runs the daemon and returns when CRI answers.
func (d *Daemon) Start(ctx context.Context) error {
	log, err := os.OpenFile(d.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd = exec.Command(filepath.Join(d.bin, "berthd"), d.args...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.Env = append(os.Environ(), d.Env...)
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a terminal's interrupt is for the test, not for the daemon
	if err := d.cmd.Start(); err != nil {
		return err
	}
	done := make(chan error, 1)
	cmd := d.cmd
	go func() { done <- cmd.Wait() }()
	d.done = done
	ctx, cancel := context.WithTimeout(ctx, pace.Wait(30*time.Second))
	defer cancel()
	for {
		_, err := d.Runtime.Version(ctx, &cri.VersionRequest{}, grpc.WaitForReady(false))
		if err == nil {
			return nil
		}
		select {
		case werr := <-done:
			d.cmd = nil
			return fmt.Errorf("berthd ended at its start (%v):\n%s", werr, d.LogTail(4096))
		case <-ctx.Done():
			return fmt.Errorf("berthd does not answer: %w\n%s", err, d.LogTail(4096))
		case <-time.After(10 * time.Millisecond):
			d.conn.ResetConnectBackoff()
		}
	}
}

// Pid is the daemon's process id; 0 when it does not run.
func (d *Daemon) Pid() int {
	if d.cmd == nil {
		return 0
	}
	return d.cmd.Process.Pid
}

// Kill ends the daemon with sig and waits for its end.
func (d *Daemon) Kill(sig syscall.Signal) error {
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(sig); err != nil {
		return err
	}
	select {
	case <-d.done:
		d.cmd = nil
		return nil
	case <-time.After(pace.Wait(30 * time.Second)):
		return fmt.Errorf("berthd %d does not end on %v", d.Pid(), sig)
	}
}

// Ended waits for the daemon to end by itself; false when it does not within wait.
func (d *Daemon) Ended(wait time.Duration) bool {
	if d.cmd == nil {
		return true
	}
	select {
	case <-d.done:
		d.cmd = nil
		return true
	case <-time.After(wait):
		return false
	}
}

// SupervisorPid reads the supervisor's process id; 0 when there is none.
func (d *Daemon) SupervisorPid() int {
	b, err := os.ReadFile(filepath.Join(d.Dir, "run", "supervisor.lock"))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || !strings.Contains(exe, "berth-supervisor") {
		return 0
	}
	return pid
}

// RemoveAll stops and removes every pod sandbox and image.
func (d *Daemon) RemoveAll(ctx context.Context) error {
	pods, err := d.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods.Items {
		if _, err := d.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			errs = append(errs, err)
		}
		if _, err := d.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			errs = append(errs, err)
		}
	}
	images, err := d.Images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, i := range images.Images {
		if _, err := d.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: i.Id}}); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Close removes all pods, ends the daemon and its supervisor, and waits for
// both. The daemon is started again for that when it was killed.
func (d *Daemon) Close(ctx context.Context) error {
	var errs []error
	if d.cmd == nil {
		errs = append(errs, d.Start(ctx))
	}
	if d.cmd != nil {
		errs = append(errs, d.RemoveAll(ctx), d.Kill(syscall.SIGTERM))
	}
	errs = append(errs, d.conn.Close())
	if pid := d.SupervisorPid(); pid != 0 {
		errs = append(errs, syscall.Kill(pid, syscall.SIGTERM))
		for deadline := time.Now().Add(pace.Wait(15 * time.Second)); d.SupervisorPid() != 0; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				errs = append(errs, fmt.Errorf("supervisor %d does not end", pid))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// LogFile is where the daemon's own log goes.
func (d *Daemon) LogFile() string { return filepath.Join(d.Dir, "berthd.log") }

// LogTail returns the last n bytes of the daemon's log.
func (d *Daemon) LogTail(n int) string {
	b, _ := os.ReadFile(d.LogFile())
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return string(b)
}
