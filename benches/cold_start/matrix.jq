# All measurements in; medians, spread and ratios per (profile, image, format, snapshotter) out. The bases of ratios are overlayfs, and
# containerd's EROFS snapshotter where it was measured, with the plain image over the same link; 0 is a ratio to what was not measured.
def median: sort | if length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
def whole: .ready + .full;

. as $all
| def base($snapshotter; f; $row): [$all[] | select(.profile == $row.profile and .image == $row.image and .snapshotter == $snapshotter and .format == "plain") | f]
    | if length > 0 then median else null end;
def part($base): if $base then . / $base else 0 end;
{
    machine: {kernel: $kernel, cpus: $cpus, containerd: $containerd},
    runs: $runs,
    # Not those of others: mkfs.erofs 1.8 makes directories that a layer's tar leaves out world-writable.
    trees_differ: [$all | map(select(.snapshotter == "overlayfs" or (.snapshotter | startswith("lazuli")))) | group_by(.image)[] | {image: .[0].image, trees: (map(.digest) | unique | length)} | select(.trees > 1) | .image],
    rows: ($all | group_by([.profile, .image]) | map(
        group_by([.format, .snapshotter]) | sort_by([(.[0].format != "plain"), .[0].format, (.[0].snapshotter != "overlayfs"), .[0].snapshotter])[]
        | .[0] as $first | (map(.ready) | median) as $ready
        | (map(whole) | median) as $whole
        | {
            profile: $first.profile,
            image: $first.image,
            format: $first.format,
            snapshotter: $first.snapshotter,
            pull: (map(.pull) | median),
            create: (map(.create) | median),
            run: (map(.run) | median),
            ready: $ready,
            ratio: ($ready | part(base("overlayfs"; .ready; $first))),
            erofs_ratio: ($ready | part(base("erofs"; .ready; $first))),
            spread: (((map(.ready) | max) - (map(.ready) | min)) / $ready),
            again: (map(.again) | median),
            full: (map(.full) | median),
            $whole,
            whole_ratio: ($whole | part(base("overlayfs"; whole; $first))),
            whole_erofs_ratio: ($whole | part(base("erofs"; whole; $first))),
            megabytes: ((map(.bytes) | median) / 1e6),
            requests: (map(.requests) | median)
        })),
    measurements: $all
  }
