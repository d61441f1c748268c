package builtin

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
)

// benchmark times Attach and Detach apart and reports their medians and p99.
func benchmark(b *testing.B, pool int, pause time.Duration, ports ...cni.PortMapping) {
	w := newWorld(b)
	n := w.open(Config{PoolSize: pool})
	var up, down []time.Duration
	for b.Loop() {
		if pool > 0 {
			for n.wanting() {
				time.Sleep(time.Millisecond)
			}
		}
		time.Sleep(pause)
		p := cni.Pod{ID: id.NewPod(), PortMappings: ports}
		t0 := time.Now()
		a, ns, err := n.Attach(context.Background(), p)
		if err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if err := n.Detach(context.Background(), p, a, ns); err != nil {
			b.Fatal(err)
		}
		ns.Close()
		up, down = append(up, t1.Sub(t0)), append(down, time.Since(t1))
	}
	for name, d := range map[string][]time.Duration{"attach": up, "detach": down} {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds()), name+"-p50-us")
		b.ReportMetric(float64(d[len(d)*99/100].Microseconds()), name+"-p99-us")
	}
}

func BenchmarkAttachPool(b *testing.B) { benchmark(b, 8, 0) }
func BenchmarkAttachCold(b *testing.B) { benchmark(b, -1, 0) }

// A node that is mostly idle: no teardown runs while a pod starts.
func BenchmarkAttachColdIdle(b *testing.B) { benchmark(b, -1, 60*time.Millisecond) }

func BenchmarkAttachPoolHostPort(b *testing.B) {
	benchmark(b, 8, 0, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
}

// A UDP port makes the background search conntrack, which competes here.
func BenchmarkAttachPoolHostPortUDP(b *testing.B) {
	benchmark(b, 8, 0, cni.PortMapping{Protocol: cni.UDP, ContainerPort: 53, HostPort: 8053})
}
