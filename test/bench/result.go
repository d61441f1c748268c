package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// result is what one run found, in the order that it was found in.
type result struct {
	Name    string    `json:"name"`
	Runtime string    `json:"runtime"`
	Kernel  string    `json:"kernel"`
	CPUs    int       `json:"cpus"`
	Time    time.Time `json:"time"`
	Metrics []*metric `json:"metrics"`

	mu      sync.Mutex
	samples map[*metric][]float64
}

// metric is the spread of one thing measured N times. All are of Unit.
type metric struct {
	Part string  `json:"part"`
	Name string  `json:"name"`
	Unit string  `json:"unit"`
	N    int     `json:"n"`
	Min  float64 `json:"min"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
}

func newResult(o *options, v *cri.VersionResponse) *result {
	r := &result{
		Name: o.name, Runtime: v.RuntimeName + " " + v.RuntimeVersion, CPUs: runtime.NumCPU(), Time: time.Now().UTC(),
		samples: map[*metric][]float64{},
	}
	if r.Name == "" {
		r.Name = v.RuntimeName
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return r
}

// series adds metrics of one part. It may be used from several goroutines.
type series struct {
	r    *result
	part string
}

func (r *result) series(part string) *series { return &series{r, part} }

// took adds one latency.
func (s *series) took(name string, d time.Duration) { s.add(name, "ms", float64(d)/1e6) }

// value adds a thing that is measured once a run.
func (s *series) value(name, unit string, v float64) { s.add(name, unit, v) }

func (s *series) add(name, unit string, v float64) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	i := slices.IndexFunc(s.r.Metrics, func(m *metric) bool { return m.Part == s.part && m.Name == name })
	if i < 0 {
		i = len(s.r.Metrics)
		s.r.Metrics = append(s.r.Metrics, &metric{Part: s.part, Name: name, Unit: unit})
	}
	m := s.r.Metrics[i]
	s.r.samples[m] = append(s.r.samples[m], v)
}

// sum fills in the spreads.
func (r *result) sum() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for m, v := range r.samples {
		slices.Sort(v)
		m.N, m.Min, m.P50, m.P90, m.P99, m.Max = len(v), v[0], quantile(v, 0.5), quantile(v, 0.9), quantile(v, 0.99), v[len(v)-1]
	}
}

// quantile is the smallest of the sorted values that at least q of them do not
// exceed: a value that was measured, never one in between.
func quantile(sorted []float64, q float64) float64 {
	i := int(q * float64(len(sorted)))
	if float64(i) == q*float64(len(sorted)) && i > 0 {
		i--
	}
	return sorted[min(i, len(sorted)-1)]
}

func (r *result) print(w io.Writer) {
	r.sum()
	fmt.Fprintf(w, "%s (%s), kernel %s, %d CPUs\n", r.Name, r.Runtime, r.Kernel, r.CPUs)
	part := ""
	for _, m := range r.Metrics {
		if m.Part != part {
			part = m.Part
			fmt.Fprintf(w, "\n%-40s %-11s %8s %8s %8s %8s %5s\n", strings.ToUpper(part), "", "min", "p50", "p90", "p99", "n")
		}
		if m.N == 1 {
			fmt.Fprintf(w, "%-40s %-11s %8s %8s\n", m.Name, m.Unit, "", number(m.P50))
			continue
		}
		fmt.Fprintf(w, "%-40s %-11s %8s %8s %8s %8s %5d\n", m.Name, m.Unit, number(m.Min), number(m.P50), number(m.P90), number(m.P99), m.N)
	}
}

// number prints three digits that matter.
func number(v float64) string {
	switch {
	case v < 0 || v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (r *result) save(file string) error {
	r.sum()
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}
