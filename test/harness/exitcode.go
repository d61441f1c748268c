package harness

import (
	"os/exec"
	"sync"
	"syscall"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/internal/kernel"
)

// CodesSurvive tells whether this kernel tells others than the parent how a process
// ended (Linux 6.15). Else what has lost its supervisor ends with 255, Unknown,
// unless its status could be read before the machine's init reaped it.
var CodesSurvive = sync.OnceValue(func() bool {
	fd := -1
	cmd := exec.Command("/bin/sh", "-c", "exit 3")
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &fd}
	_ = cmd.Run()
	defer syscall.Close(fd)
	_, ok, err := kernel.ExitStatus(fd)
	return ok && err == nil
})

// CodeUnknown tells whether a container that may have lost its supervisor ended as
// one does whose exit code this kernel does not tell.
func CodeUnknown(s *cri.ContainerStatus) bool {
	return !CodesSurvive() && s.State == cri.ContainerState_CONTAINER_EXITED && s.ExitCode == 255 && s.Reason == "Unknown" && s.Message != ""
}
