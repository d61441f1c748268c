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
)

// metrics is the Prometheus endpoint. A nil *metrics observes nothing.
type metrics struct {
	requests *prometheus.HistogramVec
	steps    *prometheus.HistogramVec
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
		served:  make(chan error, 1),
		address: l.Addr().String(),
	}
	r := prometheus.NewRegistry()
	r.MustRegister(m.requests, m.steps, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
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
