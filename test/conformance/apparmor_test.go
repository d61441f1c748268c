package conformance

import (
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// profile starts a container with an AppArmor profile; label is what the kernel
// says of its process.
func profile(t *testing.T, p *cri.SecurityProfile) (label string, err error) {
	t.Helper()
	pod := runPod(t, nil)
	c := containerConfig([]string{"sleep", "1000"})
	c.Linux.SecurityContext.Apparmor = p
	r, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: pod.id, Config: c, SandboxConfig: pod.config})
	if err != nil {
		return "", err
	}
	if _, err := node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: r.ContainerId}); err != nil {
		return "", err
	}
	out, _, _ := execSync(t, r.ContainerId, "/bin/cat", "/proc/1/attr/apparmor/current")
	return strings.TrimSpace(out), nil
}

func TestAppArmor(t *testing.T) {
	enabled, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	on := strings.HasPrefix(string(enabled), "Y")
	for name, p := range map[string]*cri.SecurityProfile{
		"not given": nil, "unconfined": {ProfileType: cri.SecurityProfile_Unconfined},
	} {
		label, err := profile(t, p)
		if err != nil || on && name == "unconfined" && label != "unconfined" {
			t.Errorf("%s: %q, %v", name, label, err)
		}
	}
	_, err := profile(t, &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "berth-no-such-profile"})
	if err == nil || !strings.Contains(err.Error(), "berth-no-such-profile") {
		t.Errorf("a profile that is not loaded: %v", err)
	}
	// The default profile confines, or, where it cannot be loaded, is refused.
	label, err := profile(t, &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault})
	switch {
	case !on:
		if err != nil {
			t.Errorf("default profile without AppArmor: %v", err)
		}
	case err != nil:
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "apparmor_parser") {
			t.Errorf("default profile: %v", err)
		}
	case label != "berth-default (enforce)":
		t.Errorf("default profile: the process is %q", label)
	}
}
