# All measurements in, medians and ratios per (format, snapshotter) out. The base of the ratio is overlayfs with the plain
# image: what a start costs today.
def median: sort | if length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;

. as $all
| ([.[] | select(.snapshotter == "overlayfs" and .format == "plain") | .ready] | if length > 0 then median else null end) as $base
| {
    image: $image,
    link: {rtt_ms: $rtt, mbit: $mbit},
    machine: {kernel: $kernel, cpus: $cpus, containerd: $containerd},
    runs: $runs,
    trees: ([.[].digest] | unique | length),
    rows: (group_by([.format, .snapshotter]) | sort_by([(.[0].format != "plain"), (.[0].snapshotter != "overlayfs"), .[0].snapshotter]) | map({
        format: .[0].format,
        snapshotter: .[0].snapshotter,
        pull: (map(.pull) | median),
        create: (map(.create) | median),
        run: (map(.run) | median),
        ready: (map(.ready) | median),
        ratio: (if $base then (map(.ready) | median) / $base else 0 end),
        megabytes: ((map(.bytes) | median) / 1e6),
        requests: (map(.requests) | median),
        full: (map(.full) | median),
        total_megabytes: ((map(.all_bytes) | median) / 1e6),
        digests: (map(.digest) | unique)
    })),
    measurements: $all
  }
