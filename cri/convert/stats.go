package convert

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/sandbox"
)

// ContainerStats is one reading as CRI shows it. What the kernel does not tell
// is absent and not 0: an absent available_bytes says that there is no limit.
func ContainerStats(s *sandbox.ContainerStats) *runtimeapi.ContainerStats {
	c, at := s.Container, nano(s.At)
	out := &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{
			Id:          string(c.ID),
			Metadata:    containerMetadata(c.Config.Meta),
			Labels:      c.Config.Labels,
			Annotations: c.Config.Annotations,
		},
		Cpu: &runtimeapi.CpuUsage{
			Timestamp:            at,
			UsageCoreNanoSeconds: value(s.CPUNanoseconds),
			UsageNanoCores:       optional(s.CPUNanocores),
			Psi:                  pressure(s.CPUPressure),
		},
		Memory: &runtimeapi.MemoryUsage{
			Timestamp:       at,
			WorkingSetBytes: value(s.WorkingSet),
			AvailableBytes:  optional(s.MemoryAvailable),
			UsageBytes:      value(s.MemoryUsage),
			RssBytes:        value(s.RSS),
			PageFaults:      value(s.PageFaults),
			MajorPageFaults: value(s.MajorPageFaults),
			Psi:             pressure(s.MemoryPressure),
		},
		WritableLayer: &runtimeapi.FilesystemUsage{
			Timestamp:  nano(s.WritableAt),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.FsMountpoint},
			UsedBytes:  value(s.WritableBytes),
			InodesUsed: value(s.WritableInodes),
		},
	}
	if s.SwapUsage != nil || s.SwapAvailable != nil {
		out.Swap = &runtimeapi.SwapUsage{Timestamp: at, SwapUsageBytes: optional(s.SwapUsage), SwapAvailableBytes: optional(s.SwapAvailable)}
	}
	if s.IOPressure != nil {
		out.Io = &runtimeapi.IoUsage{Timestamp: at, Psi: pressure(s.IOPressure)}
	}
	return out
}

func value(v uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: v} }

func optional(v *uint64) *runtimeapi.UInt64Value {
	if v == nil {
		return nil
	}
	return value(*v)
}

func pressure(p *sandbox.Pressure) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	return &runtimeapi.PsiStats{Some: psi(p.Some), Full: psi(p.Full)}
}

func psi(p *sandbox.PSI) *runtimeapi.PsiData {
	if p == nil {
		return nil
	}
	return &runtimeapi.PsiData{Total: p.Total, Avg10: p.Avg10, Avg60: p.Avg60, Avg300: p.Avg300}
}
