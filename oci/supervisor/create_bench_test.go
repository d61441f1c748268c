package supervisor_test

import (
	"slices"
	"testing"
	"time"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
)

// BenchmarkCreate makes containers with the default seccomp profile: with a
// runtime that does nothing it shows what the request itself costs.
func BenchmarkCreate(b *testing.B) {
	for name, handler := range map[string]string{"request": "", "embedded": "berth"} {
		b.Run(name, func(b *testing.B) {
			n := newNode(b)
			c, root := n.open(), rootfs(b)
			b.Cleanup(removeCgroupRoot)
			r := isolated(root, "sleep")
			r.Spec.Process.Capabilities = &specs.LinuxCapabilities{}
			p, err := seccomp.GetDefaultProfile(r.Spec)
			if err != nil {
				b.Fatal(err)
			}
			r.Handler, r.Spec.Linux.Seccomp = handler, p
			var took []time.Duration
			for b.Loop() {
				r.ID = id.NewContainer()
				r.Spec.Linux.CgroupsPath = cgroupRoot + "/" + string(r.ID)[:12]
				begin := time.Now()
				if err := c.Create(b.Context(), r); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(begin))
				if err := c.Delete(b.Context(), r.ID); err != nil {
					b.Fatal(err)
				}
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "create-p50-us")
		})
	}
}
