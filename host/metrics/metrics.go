// Package metrics shows Prometheus what a node counts. Names and units are as its
// documentation wants them (prometheus.io/docs/practices/naming): base units, counters
// end in _total. No label has more values than there are classes, queues, sources or
// registries, each of which is bounded: none is an image, a layer or a pod.
package metrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tatami-containers/tatami/host/blobs"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// Values are what a node counts, at one time.
type Values struct {
	Node       node.Stats
	Space      store.Space
	Blobs      blobs.Stats
	Classes    []sched.Class
	Queues     []sched.QueueStatus
	Containers map[string]int64 // by class
	Sandboxes  int
	RelayBytes int64 // sent to sandboxes
}

// emit gives one value with the values of its family's labels.
type emit func(value float64, labels ...string)

// family is what Prometheus calls a metric: one name with all its labels.
type family struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	each func(v *Values, emit emit)
}

// counter is a family of what only grows, of which the name ends in _total.
func counter(name, help string, each func(*Values, emit), labels ...string) family {
	return family{prometheus.NewDesc("tatami_"+name+"_total", help, labels, nil), prometheus.CounterValue, each}
}

// gauge is a family of what is so now.
func gauge(name, help string, each func(*Values, emit), labels ...string) family {
	return family{prometheus.NewDesc("tatami_"+name, help, labels, nil), prometheus.GaugeValue, each}
}

// one is the only value of a family without labels.
func one[N int | int64 | float64](of func(*Values) N) func(*Values, emit) {
	return func(v *Values, emit emit) { emit(float64(of(v))) }
}

// collector reads all values once for each scrape.
type collector struct {
	read     func() Values
	families []family
}

func newCollector(read func() Values) *collector {
	c := &collector{read: read}
	for _, part := range [][]family{storeFamilies(), registryFamilies(), queueFamilies(), classFamilies()} {
		c.families = append(c.families, part...)
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, f := range c.families {
		out <- f.desc
	}
}

// Collect implements prometheus.Collector. Names of hosts come from redirects, and may be
// anything: of equal ones the first counts, as Prometheus would take none of all values.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	v := c.read()
	for _, f := range c.families {
		seen := map[string]bool{}
		f.each(&v, func(value float64, labels ...string) {
			for i, l := range labels {
				labels[i] = strings.ToValidUTF8(l, "?")
			}
			if key := strings.Join(labels, "\xff"); !seen[key] {
				seen[key] = true
				out <- prometheus.MustNewConstMetric(f.desc, f.kind, value, labels...)
			}
		})
	}
}
