# All measurements in; a row with median, ratio and target per (part, measure, state, setup) out. The base of a ratio is overlayfs.
def median: sort | if length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;

# The largest ratio that is good enough.
def target:
    if .part == "layer" and .setup == "tree" and .state == "warm" then 1.05
    elif .part == "layer" and (.setup == "fuse" or .setup == "file") and .state == "warm" then
        {find: 0.9, tar: 0.8, python: 1.0}[.measure]
    elif .part == "big" and .state == "warm" and .setup != "memory" then (if .setup == "tree" then 1.05 else 1.0 end)
    elif .part == "layer" and .setup == "fuse" and .state == "cold" then {find: 0.7, tar: 0.9}[.measure]
    elif .part == "layer" and .setup == "file" and .state == "cold" then {find: 0.6, tar: 0.6}[.measure]
    elif (.part == "chain" or .part == "split") and .setup == "file" then {cold: 0.35, warm: 0.75}[.state]
    elif (.part | startswith("create")) and .setup == "file" and .measure == "create" then 1.0
    else null end;

def rank($list): . as $it | $list | index($it) // length;

. as $all
| (group_by([.part, .measure, .state, .setup]) | map({
    part: .[0].part, measure: .[0].measure, state: .[0].state, setup: .[0].setup,
    runs: length,
    seconds: (map(.seconds) | median),
    cpu: (map(.cpu | values) | if length > 0 then median else null end),
    least: (map(.seconds) | min),
    most: (map(.seconds) | max)
  })) as $rows
| {
    machine: {kernel: $kernel, cpus: $cpus, containerd: $containerd, load: $load},
    rounds: {layer: $runs, big: $runs, chain: $runs, split: $runs, create: $creates},
    rows: ($rows | map(
        . as $row
        | ($rows[] | select(.part == $row.part and .measure == $row.measure and .state == $row.state and .setup == "overlayfs")) as $base
        | (target) as $target
        | . + {
            ratio: (.seconds / $base.seconds),
            cpu_ratio: (if .state == "warm" and (.cpu // 0) > 0 and ($base.cpu // 0) > 0 then .cpu / $base.cpu else null end),
            $target,
            met: (if $target then .seconds / $base.seconds <= $target else null end)
          }
      ) | sort_by([(.part | rank(["layer", "big", "chain", "split", "create-1", "create-10", "create-100"])), (.measure | rank(["find", "tar", "python", "random", "sequential", "create"])),
        (.state | rank(["warm", "cold", "first", "again", "next"])), (.setup | rank(["overlayfs", "fuse", "file", "tree", "memory"]))])),
    measurements: $all
  }
