# All measurements in; medians, spread and ratios per (profile, image, format, snapshotter) out. The base of a ratio is overlayfs with the plain image
# over the same link.
def median: sort | if length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
def whole: .ready + .full;

. as $all
| def base(f; $row): [$all[] | select(.profile == $row.profile and .image == $row.image and .snapshotter == "overlayfs" and .format == "plain") | f]
    | if length > 0 then median else null end;
{
    machine: {kernel: $kernel, cpus: $cpus, containerd: $containerd},
    runs: $runs,
    # Not containerd's EROFS snapshotter: mkfs.erofs 1.8 makes directories that a layer's tar leaves out world-writable.
    trees_differ: [$all | map(select(.snapshotter != "erofs")) | group_by(.image)[] | {image: .[0].image, trees: (map(.digest) | unique | length)} | select(.trees > 1) | .image],
    rows: ($all | group_by([.profile, .image]) | map(
        group_by([.format, .snapshotter]) | sort_by([(.[0].format != "plain"), .[0].format, (.[0].snapshotter != "overlayfs"), .[0].snapshotter])[]
        | .[0] as $first | (map(.ready) | median) as $ready
        | base(.ready; $first) as $overlayfs | base(whole; $first) as $overlayfs_whole
        | {
            profile: $first.profile,
            image: $first.image,
            format: $first.format,
            snapshotter: $first.snapshotter,
            pull: (map(.pull) | median),
            create: (map(.create) | median),
            run: (map(.run) | median),
            ready: $ready,
            ratio: (if $overlayfs then $ready / $overlayfs else 0 end),
            spread: (((map(.ready) | max) - (map(.ready) | min)) / $ready),
            again: (map(.again) | median),
            full: (map(.full) | median),
            whole: (map(whole) | median),
            whole_ratio: (if $overlayfs_whole then (map(whole) | median) / $overlayfs_whole else 0 end),
            megabytes: ((map(.bytes) | median) / 1e6),
            requests: (map(.requests) | median)
        })),
    measurements: $all
  }
