package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var serial atomic.Int64

// PodConfig is the configuration of a pod sandbox that nobody had before; its
// logs go below the daemon's folder.
func (d *Daemon) PodConfig() *cri.PodSandboxConfig {
	n := serial.Add(1)
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: fmt.Sprintf("pod%d", n), Uid: fmt.Sprintf("uid-%d-%d", os.Getpid(), n), Namespace: "test"},
		Hostname:     fmt.Sprintf("host%d", n),
		LogDirectory: filepath.Join(d.Dir, "log", fmt.Sprintf("pod%d", n)),
		DnsConfig:    &cri.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"test.example"}, Options: []string{"ndots:5"}},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
}

// ContainerConfig is the configuration of a container that nobody had before.
func ContainerConfig(image string, args ...string) *cri.ContainerConfig {
	n := serial.Add(1)
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: fmt.Sprintf("c%d", n)},
		Image:    &cri.ImageSpec{Image: image, UserSpecifiedImage: image},
		Args:     args,
		LogPath:  fmt.Sprintf("c%d/0.log", n),
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
}
