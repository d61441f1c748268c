package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/codes"

	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/sandbox"
)

// metrics is the Prometheus endpoint. A nil *metrics observes nothing.
type metrics struct {
	requests *prometheus.HistogramVec
	steps    *prometheus.HistogramVec
	found    *prometheus.CounterVec
	removed  *prometheus.CounterVec
	failed   *prometheus.CounterVec
	unseen   prometheus.Counter
	round    prometheus.Gauge
	rounded  prometheus.Gauge
	http     *http.Server
	served   chan error
	address  string
}

// buckets reach from a request served from memory to a slow pull, in seconds.
var buckets = []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 30, 120}

func openMetrics(address string) (*metrics, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics_address %s: %w", address, err)
	}
	m := &metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "berth_cri_request_duration_seconds", Help: "Time to answer a CRI request.", Buckets: buckets,
		}, []string{"method", "code"}),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "berth_operation_step_duration_seconds", Help: "Time of one step of an engine operation.", Buckets: buckets,
		}, []string{"operation", "step", "result"}),
		found: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "berth_leftovers_found_total", Help: "Things that were found to belong to no record, twice in a row.",
		}, []string{"kind"}),
		removed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "berth_leftovers_removed_total", Help: "Leftovers that were removed.",
		}, []string{"kind"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "berth_leftovers_failed_total", Help: "Attempts to remove a leftover that failed.",
		}, []string{"kind"}),
		unseen: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "berth_leftovers_incomplete_rounds_total", Help: "Looks for leftovers that could not look everywhere.",
		}),
		round: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "berth_leftovers_round_duration_seconds", Help: "Time that the last look for leftovers took, removals included.",
		}),
		rounded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "berth_leftovers_round_timestamp_seconds", Help: "When the last look for leftovers ended, in seconds since 1970.",
		}),
		served:  make(chan error, 1),
		address: l.Addr().String(),
	}
	r := prometheus.NewRegistry()
	for _, k := range leftover.Kinds { // a counter that is not there cannot be told from none
		for _, c := range []*prometheus.CounterVec{m.found, m.removed, m.failed} {
			c.WithLabelValues(string(k))
		}
	}
	r.MustRegister(m.requests, m.steps, m.found, m.removed, m.failed, m.unseen, m.round, m.rounded,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	m.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { m.served <- m.http.Serve(l) }()
	return m, nil
}

// Close ends the endpoint.
func (m *metrics) Close() error {
	err := m.http.Close()
	if s := <-m.served; !errors.Is(s, http.ErrServerClosed) {
		err = errors.Join(err, s)
	}
	return err
}

// observe is the hook for requests, nil when nothing observes.
func (m *metrics) observe() func(string, codes.Code, time.Duration) {
	if m == nil {
		return nil
	}
	return func(method string, code codes.Code, d time.Duration) {
		m.requests.WithLabelValues(path.Base(method), code.String()).Observe(d.Seconds())
	}
}

// observeStep is the hook for steps of operations, nil when nothing observes.
func (m *metrics) observeStep() func(operation, step string, d time.Duration, err error) {
	if m == nil {
		return nil
	}
	return func(operation, step string, d time.Duration, err error) {
		result := "ok"
		if err != nil {
			result = "error"
		}
		m.steps.WithLabelValues(operation, step, result).Observe(d.Seconds())
	}
}

// reconciled is the hook for looks for leftovers, nil when nothing observes.
func (m *metrics) reconciled() func(sandbox.Round) {
	if m == nil {
		return nil
	}
	return func(r sandbox.Round) {
		for c, counts := range map[*prometheus.CounterVec]map[leftover.Kind]int{m.found: r.Found, m.removed: r.Removed, m.failed: r.Failed} {
			for k, n := range counts {
				c.WithLabelValues(string(k)).Add(float64(n))
			}
		}
		if r.Err != nil {
			m.unseen.Inc()
		}
		m.round.Set(r.Took.Seconds())
		m.rounded.SetToCurrentTime()
	}
}
