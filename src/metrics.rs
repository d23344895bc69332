//! Every metric: its name, unit and meaning. `docs/METRICS.md` lists the same.
//!
//! Labels have few values by construction: no digest, no image name, no path.

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Bounds of duration buckets, in seconds: from a local read to a deadline.
const SECONDS: &[f64] = &[
    0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// The daemon's metrics. One instance per process part that is tested on its own; the daemon has one.
pub struct Metrics {
    registry: Registry,
    /// Snapshots RPCs answered, by `rpc` and gRPC `code`.
    pub rpc_total: IntCounterVec,
    /// Duration of snapshots RPCs in seconds, by `rpc`.
    pub rpc_seconds: HistogramVec,
    /// Layers that are live now, by `access` (`ranges`, `stream`).
    pub layers_live: IntGaugeVec,
    /// Layers left to containerd, by `reason` (a fixed set of words).
    pub layers_refused_total: IntCounterVec,
    /// Layers that were streamed as a whole, by `reason` (a fixed set of words).
    pub layers_streamed_total: IntCounterVec,
    /// Layers that containerd gave to its differ Lazuli, by `outcome` (`packed`, `unpacked`: given back to containerd's own differ, `declined`: not
    /// Lazuli's, `failed`).
    pub applied_layers_total: IntCounterVec,
    /// Duration of packing a layer that containerd has fetched, in seconds.
    pub apply_seconds: Histogram,
    /// Snapshots whose size was to be limited, by `outcome` (`limited`, `unlimited`: the file system cannot).
    pub size_limits_total: IntCounterVec,
    /// Bytes of blobs that were written into containerd's content store to complete images.
    pub completed_bytes_total: IntCounter,
    /// Bytes of blobs that containerd was lent while they were streamed.
    pub lent_bytes_total: IntCounter,
    /// Layers that containerd was lent, by `outcome`.
    pub lent_layers_total: IntCounterVec,
    /// Bytes of blobs that were fetched to make layers whole.
    pub filled_bytes_total: IntCounter,
    /// Bytes of blobs that were asked for because all of a layer seemed to be read.
    pub dense_bytes_total: IntCounter,
    /// FUSE requests, by `op`.
    pub fuse_requests_total: IntCounterVec,
    /// FUSE requests answered with an error other than ENOENT and ENODATA, by `errno`.
    pub fuse_errors_total: IntCounterVec,
    /// Takeovers of the FUSE connection by a new worker since the supervisor was started.
    pub takeovers_total: IntCounter,
    /// Requests that an earlier worker had read and not answered, and that this one was sent once more.
    pub fuse_resent_requests_total: IntCounter,
    /// Seconds from the death of the worker before this one until this one answered; 0 if there was none.
    pub takeover_stall_seconds: Gauge,
    /// EROFS mounts of layers and chains that exist now, by `kind` (`file`: over files of the cache alone, `image`: with FUSE below).
    pub face_mounts: IntGaugeVec,
    /// EROFS mounts that failed, by `cause` (`index`: EROFS cannot express the layer, `disk`: metadata could not be stored, `mount`: the
    /// kernel refused, `deadline`: the kernel did not answer). What they were to show is shown as a tree.
    pub face_mount_failures_total: IntCounterVec,
    /// Duration of EROFS mounts in seconds, from the index to the mount.
    pub face_mount_seconds: Histogram,
    /// Mount calls that did not come back in time and are still waited for by a thread of their own.
    pub face_calls_left_behind: IntGauge,
    /// Chains of layers merged into one image, by `outcome` (`built`, `loaded`: found on disk, `failed`).
    pub face_chains_total: IntCounterVec,
    /// Extended attributes left out of images, since EROFS cannot express them.
    pub face_dropped_xattrs_total: IntCounter,
    /// Reads that wait now for bytes that have to be fetched.
    pub waiting_reads: IntGauge,
    /// Registries that deliver nothing now while readers wait for them.
    pub outages: IntGauge,
    /// Requests that failed for now, and whose readers went on waiting.
    pub outage_retries_total: IntCounter,
    /// Bytes returned to readers.
    pub read_bytes_total: IntCounter,
    /// Reads that had to wait for a fetch: their duration in seconds.
    pub cold_read_seconds: Histogram,
    /// Ranged requests and streams begun, by `kind` (`demand`, `prefetch`, `readahead`, `background`, `stream`).
    pub fetches_total: IntCounterVec,
    /// Ranged requests that a host may be asked at once: the fewest and the most of all hosts that are known, by `of` (`lowest`, `highest`).
    pub request_limit: IntGaugeVec,
    /// Changes of that number, by `change` (`more`, `fewer`, `refused`: fewer, because a host said that it is asked too much).
    pub request_limit_changes_total: IntCounterVec,
    /// Ranges of streams that were read over further connections, by `outcome` (`done`, `failed`, `overtaken`, `passed`).
    pub stream_ranges_total: IntCounterVec,
    /// Bytes fetched from sources, by `kind`.
    pub fetched_bytes_total: IntCounterVec,
    /// HTTP requests to registries, by `class` of answer (`2xx` ... `5xx`, `error`).
    pub registry_requests_total: IntCounterVec,
    /// Requests that were repeated, by `cause` (`status`, `connection`, `cut`, `auth`, `protocol`).
    pub registry_retries_total: IntCounterVec,
    /// Chunks or layers whose bytes did not have the promised digest, by `origin` (`source`, `disk`).
    pub verify_failures_total: IntCounterVec,
    /// Searches for a shared index of a layer, by `result` (`found`, `none`, `untrusted`, `damaged`, `failed`).
    pub index_lookups_total: IntCounterVec,
    /// Searches for a layer in the SOCI index of its image, by `result` (`found`, `left-out`, `none`, `damaged`, `failed`).
    pub soci_lookups_total: IntCounterVec,
    /// Indexes that were built here and were to be published, by `result` (`published`, `present`, `failed`).
    pub index_publications_total: IntCounterVec,
    /// Layers that are wholly here and whose shared index does not describe them.
    pub index_mismatches_total: IntCounter,
    /// Starts of containers that were watched, by `outcome` (`recorded`, `empty`: nothing was read, `unknown`: containerd did not tell what runs,
    /// `failed`).
    pub trace_starts_total: IntCounterVec,
    /// Images for which what earlier starts had read was fetched ahead, by `trace` (`same`: of the same image, `shared`: the same, recorded
    /// elsewhere, `repository`: of another one of its repository, `none`: nothing is known).
    pub trace_plays_total: IntCounterVec,
    /// Bytes of content that were asked for ahead because earlier starts had read them, and were not here.
    pub trace_wished_bytes_total: IntCounter,
    /// Those of them that the next start did not read.
    pub trace_wasted_bytes_total: IntCounter,
    /// Files that starts of another image of the repository had read of layers that the image does not have, by `found` (`same`: at their path,
    /// `changed`: there, with another size or content, `moved`: under another path, `gone`: nowhere).
    pub trace_carried_files_total: IntCounterVec,
    /// Images of which nothing was known and what they read to start was to be guessed, by `outcome` (`walked`, `unknown`: it was not told what
    /// runs, or it was not found, `given-up`: not all layers were there, or it took too long).
    pub walks_total: IntCounterVec,
    /// Files that were asked for ahead because what runs will read them, or parts of them.
    pub walk_files_total: IntCounter,
    /// Bytes of content that were asked for ahead for that reason, and were not here.
    pub walk_wished_bytes_total: IntCounter,
    /// Those of them that the start did not read.
    pub walk_wasted_bytes_total: IntCounter,
    /// Bytes that layers take on disk, with their indexes and everything else that is kept of them.
    pub cache_bytes: IntGauge,
    /// Bytes of memory that names and attributes of layers take.
    pub names_memory_bytes: IntGauge,
    /// Bytes of files that have lost their layer and stay on disk until they are unmounted.
    pub cache_replaced_bytes: IntGauge,
    /// Bytes removed from the cache to keep its budget.
    pub cache_evicted_bytes_total: IntCounter,
    /// Bytes of chunks that were taken from another layer in the cache instead of a registry.
    pub cache_shared_bytes_total: IntCounter,
    /// Bytes that could not be cached because the disk was full.
    pub cache_bypassed_bytes_total: IntCounter,
    /// Duration of commits of the metadata database in seconds, each of all changes that were queued.
    pub database_commit_seconds: Histogram,
    /// Changes of the metadata database that were answered, written or not.
    pub database_changes_total: IntCounter,
    /// Removed directories and files that wait to be deleted, by `kind` (`snapshots`, `layers`).
    pub trash_entries: IntGaugeVec,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let r = Registry::new();
        let build = gauge_vec(
            &r,
            "lazuli_build_info",
            "Always 1; the version is in the label.",
            &["version"],
        );
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Metrics {
            rpc_total: counter_vec(
                &r,
                "lazuli_snapshots_requests_total",
                "Snapshots RPCs answered.",
                &["rpc", "code"],
            ),
            rpc_seconds: histogram_vec(
                &r,
                "lazuli_snapshots_request_seconds",
                "Duration of snapshots RPCs in seconds.",
                &["rpc"],
            ),
            layers_live: gauge_vec(&r, "lazuli_layers_live", "Layers that are live now.", &["access"]),
            layers_refused_total: counter_vec(
                &r,
                "lazuli_layers_refused_total",
                "Layers left to containerd.",
                &["reason"],
            ),
            layers_streamed_total: counter_vec(
                &r,
                "lazuli_layers_streamed_total",
                "Layers that were streamed as a whole.",
                &["reason"],
            ),
            applied_layers_total: counter_vec(
                &r,
                "lazuli_applied_layers_total",
                "Layers that containerd gave to its differ Lazuli.",
                &["outcome"],
            ),
            size_limits_total: counter_vec(
                &r,
                "lazuli_size_limits_total",
                "Snapshots whose size was to be limited.",
                &["outcome"],
            ),
            apply_seconds: histogram(
                &r,
                "lazuli_apply_seconds",
                "Duration of packing a layer that containerd has fetched, in seconds.",
            ),
            filled_bytes_total: counter(
                &r,
                "lazuli_filled_bytes_total",
                "Bytes of blobs that were fetched because they were missing, while nobody waited for anything.",
            ),
            dense_bytes_total: counter(
                &r,
                "lazuli_dense_bytes_total",
                "Bytes of blobs that were asked for ahead of readers who left nothing out.",
            ),
            completed_bytes_total: counter(
                &r,
                "lazuli_completed_bytes_total",
                "Bytes of blobs that were written into containerd's content store to complete images.",
            ),
            lent_bytes_total: counter(
                &r,
                "lazuli_lent_bytes_total",
                "Bytes of blobs that were written into containerd's content store while they were streamed.",
            ),
            lent_layers_total: counter_vec(
                &r,
                "lazuli_lent_layers_total",
                "Layers that containerd was lent while they were streamed, by what became of that.",
                &["outcome"],
            ),
            fuse_requests_total: counter_vec(&r, "lazuli_fuse_requests_total", "FUSE requests.", &["op"]),
            fuse_errors_total: counter_vec(
                &r,
                "lazuli_fuse_errors_total",
                "FUSE requests answered with an error other than ENOENT and ENODATA.",
                &["errno"],
            ),
            face_mounts: gauge_vec(
                &r,
                "lazuli_face_mounts",
                "EROFS mounts of layers and chains that exist now.",
                &["kind"],
            ),
            face_mount_failures_total: counter_vec(
                &r,
                "lazuli_face_mount_failures_total",
                "EROFS mounts that failed; a tree is shown instead.",
                &["cause"],
            ),
            face_mount_seconds: histogram(
                &r,
                "lazuli_face_mount_seconds",
                "Duration of EROFS mounts in seconds, from the index to the mount.",
            ),
            face_calls_left_behind: gauge(
                &r,
                "lazuli_face_calls_left_behind",
                "Mount calls that did not come back in time.",
            ),
            face_chains_total: counter_vec(
                &r,
                "lazuli_face_chains_total",
                "Chains of layers merged into one image.",
                &["outcome"],
            ),
            face_dropped_xattrs_total: counter(
                &r,
                "lazuli_face_dropped_xattrs_total",
                "Extended attributes left out of images, since EROFS cannot express them.",
            ),
            takeovers_total: counter(
                &r,
                "lazuli_takeovers_total",
                "Takeovers of the FUSE connection by a new worker since the supervisor was started.",
            ),
            fuse_resent_requests_total: counter(
                &r,
                "lazuli_fuse_resent_requests_total",
                "Requests that an earlier worker had read and not answered, and that this one was sent once more.",
            ),
            takeover_stall_seconds: {
                let gauge = Gauge::new(
                    "lazuli_takeover_stall_seconds",
                    "Seconds from the death of the worker before this one until this one answered; 0 if there was none.",
                );
                register(&r, gauge)
            },
            waiting_reads: gauge(
                &r,
                "lazuli_waiting_reads",
                "Reads that wait now for bytes that have to be fetched.",
            ),
            outages: gauge(
                &r,
                "lazuli_outages",
                "Registries that deliver nothing now while readers wait for them.",
            ),
            outage_retries_total: counter(
                &r,
                "lazuli_outage_retries_total",
                "Requests that failed for now, and whose readers went on waiting.",
            ),
            read_bytes_total: counter(&r, "lazuli_read_bytes_total", "Bytes returned to readers."),
            cold_read_seconds: histogram(
                &r,
                "lazuli_cold_read_seconds",
                "Duration in seconds of reads that had to wait for a fetch.",
            ),
            fetches_total: counter_vec(
                &r,
                "lazuli_fetches_total",
                "Ranged requests and streams begun.",
                &["kind"],
            ),
            request_limit: gauge_vec(
                &r,
                "lazuli_request_limit",
                "Ranged requests that a host may be asked at once, of the hosts that are known.",
                &["of"],
            ),
            request_limit_changes_total: counter_vec(
                &r,
                "lazuli_request_limit_changes_total",
                "Changes of the number of ranged requests that a host may be asked at once.",
                &["change"],
            ),
            stream_ranges_total: counter_vec(
                &r,
                "lazuli_stream_ranges_total",
                "Ranges that streams read beside their first connection, by what became of them.",
                &["outcome"],
            ),
            fetched_bytes_total: counter_vec(
                &r,
                "lazuli_fetched_bytes_total",
                "Bytes fetched from sources.",
                &["kind"],
            ),
            registry_requests_total: counter_vec(
                &r,
                "lazuli_registry_requests_total",
                "HTTP requests to registries, by class of answer.",
                &["class"],
            ),
            registry_retries_total: counter_vec(
                &r,
                "lazuli_registry_retries_total",
                "Requests to registries that were repeated.",
                &["cause"],
            ),
            verify_failures_total: counter_vec(
                &r,
                "lazuli_verify_failures_total",
                "Chunks or layers whose bytes did not have the promised digest.",
                &["origin"],
            ),
            index_lookups_total: counter_vec(
                &r,
                "lazuli_index_lookups_total",
                "Searches for a shared index of a layer.",
                &["result"],
            ),
            soci_lookups_total: counter_vec(
                &r,
                "lazuli_soci_lookups_total",
                "Searches for a layer in the SOCI index of its image.",
                &["result"],
            ),
            index_publications_total: counter_vec(
                &r,
                "lazuli_index_publications_total",
                "Indexes that were built here and were to be published.",
                &["result"],
            ),
            index_mismatches_total: counter(
                &r,
                "lazuli_index_mismatches_total",
                "Layers that are wholly here and whose shared index does not describe them.",
            ),
            trace_starts_total: counter_vec(
                &r,
                "lazuli_trace_starts_total",
                "Starts of containers that were watched.",
                &["outcome"],
            ),
            trace_plays_total: counter_vec(
                &r,
                "lazuli_trace_plays_total",
                "Images for which what earlier starts had read was fetched ahead.",
                &["trace"],
            ),
            trace_wished_bytes_total: counter(
                &r,
                "lazuli_trace_wished_bytes_total",
                "Bytes of content that were asked for ahead because earlier starts had read them.",
            ),
            trace_wasted_bytes_total: counter(
                &r,
                "lazuli_trace_wasted_bytes_total",
                "Those of them that the next start did not read.",
            ),
            trace_carried_files_total: counter_vec(
                &r,
                "lazuli_trace_carried_files_total",
                "Files that starts of another image had read, of layers that this one does not have.",
                &["found"],
            ),
            walks_total: counter_vec(
                &r,
                "lazuli_walks_total",
                "Images of which nothing was known and what they read to start was to be guessed.",
                &["outcome"],
            ),
            walk_files_total: counter(
                &r,
                "lazuli_walk_files_total",
                "Files that were asked for ahead because what runs will read them.",
            ),
            walk_wished_bytes_total: counter(
                &r,
                "lazuli_walk_wished_bytes_total",
                "Bytes of content that were asked for ahead because what runs will read them.",
            ),
            walk_wasted_bytes_total: counter(
                &r,
                "lazuli_walk_wasted_bytes_total",
                "Those of them that the start did not read.",
            ),
            cache_bytes: gauge(
                &r,
                "lazuli_cache_bytes",
                "Bytes that layers take on disk, all files counted.",
            ),
            names_memory_bytes: gauge(
                &r,
                "lazuli_names_memory_bytes",
                "Bytes of memory that names and attributes of layers take.",
            ),
            cache_replaced_bytes: gauge(
                &r,
                "lazuli_cache_replaced_bytes",
                "Bytes of files that have lost their layer and stay on disk until they are unmounted.",
            ),
            cache_evicted_bytes_total: counter(
                &r,
                "lazuli_cache_evicted_bytes_total",
                "Bytes removed from the cache to keep its budget.",
            ),
            cache_shared_bytes_total: counter(
                &r,
                "lazuli_cache_shared_bytes_total",
                "Bytes of chunks that were taken from another layer in the cache instead of a registry.",
            ),
            cache_bypassed_bytes_total: counter(
                &r,
                "lazuli_cache_bypassed_bytes_total",
                "Bytes that could not be cached because the disk was full.",
            ),
            database_commit_seconds: histogram(
                &r,
                "lazuli_database_commit_seconds",
                "Duration of commits of the metadata database in seconds.",
            ),
            database_changes_total: counter(
                &r,
                "lazuli_database_changes_total",
                "Changes of the metadata database that were answered, written or not.",
            ),
            trash_entries: gauge_vec(
                &r,
                "lazuli_trash_entries",
                "Removed directories and files that wait to be deleted.",
                &["kind"],
            ),
            registry: r,
        }
    }

    /// The metrics in Prometheus' text form.
    pub fn text(&self) -> String {
        let mut out = Vec::new();
        // Encoding into memory fails only for a metric family without a name, which `Registry::register` refuses.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }
}

/// Registers a collector whose name and labels are constants of this file; a mistake in them fails every test.
fn register<C: prometheus::core::Collector + Clone + 'static>(r: &Registry, c: prometheus::Result<C>) -> C {
    let c = c.expect("metric names and labels in this file are valid");
    r.register(Box::new(c.clone()))
        .expect("metric names in this file are unique");
    c
}

fn counter(r: &Registry, name: &str, help: &str) -> IntCounter {
    register(r, IntCounter::new(name, help))
}

fn counter_vec(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(r, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(r: &Registry, name: &str, help: &str) -> IntGauge {
    register(r, IntGauge::new(name, help))
}

fn gauge_vec(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    register(r, IntGaugeVec::new(Opts::new(name, help), labels))
}

fn histogram(r: &Registry, name: &str, help: &str) -> Histogram {
    register(
        r,
        Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())),
    )
}

fn histogram_vec(r: &Registry, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
    register(
        r,
        HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_what_was_counted() {
        let metrics = Metrics::new();
        metrics.rpc_total.with_label_values(&["Prepare", "AlreadyExists"]).inc();
        metrics.cold_read_seconds.observe(0.02);
        let text = metrics.text();
        assert!(
            text.contains(r#"lazuli_snapshots_requests_total{code="AlreadyExists",rpc="Prepare"} 1"#),
            "{text}"
        );
        assert!(text.contains("lazuli_cold_read_seconds_count 1"), "{text}");
        assert!(text.contains("lazuli_build_info"), "{text}");
    }
}
