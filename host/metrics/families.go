package metrics

import (
	"cmp"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// noClass stands for users of images that nobody has given a class.
const noClass = "none"

func storeFamilies() []family {
	source := func(of func(store.SourceStats) int64) func(*Values, emit) {
		return func(v *Values, emit emit) {
			for _, s := range v.Node.Store.Sources {
				emit(float64(of(s)), s.Name)
			}
		}
	}
	class := func(of func(store.ClassStats) int64) func(*Values, emit) {
		return func(v *Values, emit emit) {
			for _, c := range v.Node.Store.Classes {
				emit(float64(of(c)), cmp.Or(c.Class, noClass))
			}
		}
	}
	rank := func(of func(store.RankStats) float64) func(*Values, emit) {
		return func(v *Values, emit emit) {
			for _, c := range v.Node.Store.Classes {
				for r, s := range c.Ranks {
					emit(of(s), cmp.Or(c.Class, noClass), sched.Rank(r).String())
				}
			}
		}
	}
	return []family{
		counter("store_hits", "Reads of images that waited for nothing.", class(func(c store.ClassStats) int64 { return c.Hits }), "class"),
		counter("store_hit_bytes", "Bytes of those reads.", class(func(c store.ClassStats) int64 { return c.HitBytes }), "class"),
		counter("store_misses", "Reads of images that waited for bytes.", rank(func(r store.RankStats) float64 { return float64(r.Misses) }), "class", "rank"),
		counter("store_miss_bytes", "Bytes of those reads.", rank(func(r store.RankStats) float64 { return float64(r.MissBytes) }), "class", "rank"),
		counter("store_miss_wait_seconds", "How long those reads waited.", rank(func(r store.RankStats) float64 { return r.Wait.Seconds() }), "class", "rank"),
		counter("store_promotions", "Fetches begun for others or for later that such a read joined and made urgent.", rank(func(r store.RankStats) float64 { return float64(r.Promoted) }), "class", "rank"),
		counter("store_verify_failures", "Chunks with wrong bytes, which nobody was given.", one(func(v *Values) int64 { return v.Node.Store.VerifyFailures })),
		counter("store_keep_failures", "Chunks that the disk did not take or lost.", one(func(v *Values) int64 { return v.Node.Store.KeepFailures })),
		counter("store_evicted_bytes", "Bytes that were given up for others.", one(func(v *Values) int64 { return v.Space.Evicted })),
		counter("store_refused_bytes", "Bytes that were not kept as nothing could be given up for them.", one(func(v *Values) int64 { return v.Space.Refused })),
		gauge("store_used_bytes", "Bytes of images on the disk.", one(func(v *Values) int64 { return v.Space.Used })),
		gauge("store_quota_bytes", "Bytes of images that may be on the disk; 0 without a bound.", one(func(v *Values) int64 { return v.Space.Quota })),
		gauge("store_pinned_bytes", "Bytes of pinned images on the disk.", one(func(v *Values) int64 { return v.Space.Pinned })),
		gauge("store_memory_bytes", "Memory of chunks on their way.", one(func(v *Values) int64 { return v.Node.Store.MemoryBytes })),
		gauge("store_fetches_in_flight", "Fetches under way.", one(func(v *Values) int64 { return v.Node.Store.FetchesInFlight })),
		counter("store_source_requests", "Fetches, by where from.", source(func(s store.SourceStats) int64 { return s.Requests }), "source"),
		counter("store_source_bytes", "Bytes fetched, by where from.", source(func(s store.SourceStats) int64 { return s.Bytes }), "source"),
		counter("store_source_errors", "Fetches that failed, by where from.", source(func(s store.SourceStats) int64 { return s.Errors }), "source"),
		gauge("blobs_used_bytes", "Bytes of compressed blobs on the disk.", one(func(v *Values) int64 { return v.Blobs.Used })),
		counter("blobs_hits", "Requests for blobs that were answered from the disk.", one(func(v *Values) int64 { return v.Blobs.Hits })),
		counter("blobs_passed", "Requests for blobs that were passed on to a registry.", one(func(v *Values) int64 { return v.Blobs.Passed })),
	}
}

func registryFamilies() []family {
	host := func(of func(registry.HostStats) int64) func(*Values, emit) {
		return func(v *Values, emit emit) {
			for _, h := range v.Node.Registry.Hosts {
				emit(float64(of(h)), h.Host)
			}
		}
	}
	return []family{
		counter("registry_requests", "Requests to registries, mirrors and where they redirect to.", host(func(h registry.HostStats) int64 { return h.Requests }), "host"),
		counter("registry_manifest_requests", "GET requests for manifests, which Docker Hub counts as pulls.", host(func(h registry.HostStats) int64 { return h.Manifests }), "host"),
		counter("registry_received_bytes", "Bytes of answers.", host(func(h registry.HostStats) int64 { return h.Bytes }), "host"),
		counter("registry_retries", "Requests that were made again.", host(func(h registry.HostStats) int64 { return h.Retries }), "host"),
		counter("registry_refused", "Answers with status 429, 503, or a pause.", host(func(h registry.HostStats) int64 { return h.Refused }), "host"),
		counter("registry_hedges", "Requests that were made here because another one stood still.", host(func(h registry.HostStats) int64 { return h.Hedges }), "host"),
		counter("registry_wrong", "Times that bytes from here were found to be wrong.", host(func(h registry.HostStats) int64 { return h.Wrong }), "host"),
		counter("registry_tokens", "Tokens that were fetched.", one(func(v *Values) int64 { return v.Node.Registry.Tokens })),
		counter("relay_sent_bytes", "Bytes sent to sandboxes.", one(func(v *Values) int64 { return v.RelayBytes })),
	}
}

// queueFamilies are of where work waits. Bytes of queue "link" are those of all
// registries' queues once more.
func queueFamilies() []family {
	class := func(of func(c sched.ClassStatus) float64) func(*Values, emit) {
		return perQueue(func(q sched.QueueStatus, emit emit) {
			for _, c := range q.Classes {
				emit(of(c), q.Name, c.Class)
			}
		})
	}
	only := func(turns bool, unit float64) func(*Values, emit) {
		return perQueue(func(q sched.QueueStatus, emit emit) {
			for _, c := range q.Classes {
				if q.Turns == turns {
					emit(float64(c.Total)*unit, q.Name, c.Class)
				}
			}
		})
	}
	limit := func(turns bool) func(*Values, emit) {
		return perQueue(func(q sched.QueueStatus, emit emit) {
			if q.Turns == turns && q.Limit > 0 {
				emit(q.Limit, q.Name)
			}
		})
	}
	return []family{
		counter("queue_bytes", "Bytes that a class got of a queue.", only(false, 1), "queue", "class"),
		counter("queue_turn_seconds", "How long a class had turns of a queue.", only(true, 1e-6), "queue", "class"),
		counter("queue_waits", "Pieces of work that did not go at once.", class(func(c sched.ClassStatus) float64 { return float64(c.Waits) }), "queue", "class"),
		counter("queue_wait_seconds", "How long they waited.", class(func(c sched.ClassStatus) float64 { return c.Waited.Seconds() }), "queue", "class"),
		counter("queue_promotions", "Pieces of work that others had begun and that became urgent for this class.", class(func(c sched.ClassStatus) float64 { return float64(c.Promoted) }), "queue", "class"),
		gauge("queue_oldest_wait_seconds", "How long the first of those that wait has waited.", class(func(c sched.ClassStatus) float64 { return c.Oldest.Seconds() }), "queue", "class"),
		gauge("queue_waiting", "Pieces of work that wait.", perQueue(waiting), "queue", "class", "rank"),
		gauge("queue_limit_bytes_per_second", "What a queue hands out at most; missing until it is known.", limit(false), "queue"),
		gauge("queue_turns", "How many turns a queue has.", limit(true), "queue"),
	}
}

func perQueue(each func(q sched.QueueStatus, emit emit)) func(*Values, emit) {
	return func(v *Values, emit emit) {
		for _, q := range v.Queues {
			each(q, emit)
		}
	}
}

func waiting(q sched.QueueStatus, emit emit) {
	for _, c := range q.Classes {
		for rank, n := range c.Waiting {
			emit(float64(n), q.Name, c.Class, sched.Rank(rank).String())
		}
	}
}

func classFamilies() []family {
	return []family{
		gauge("class_share", "The class's weight in the settings.", func(v *Values, emit emit) {
			for _, c := range v.Classes {
				emit(float64(c.Share), c.Name)
			}
		}, "class"),
		gauge("containers", "Containers, by class.", func(v *Values, emit emit) {
			for _, c := range v.Classes {
				emit(float64(v.Containers[c.Name]), c.Name)
			}
		}, "class"),
		gauge("sandboxes", "Sandboxes that are attached.", one(func(v *Values) int { return v.Sandboxes })),
		gauge("images", "Images on the node.", one(func(v *Values) int { return v.Node.Images })),
		gauge("profile_replays", "Start-up profiles that are being replayed.", one(func(v *Values) int { return v.Node.Replays })),
		counter("profile_replayed_bytes", "Bytes of profiles that were fetched so, or were there.", one(func(v *Values) int64 { return v.Node.ReplayedBytes })),
	}
}
