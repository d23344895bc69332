# What the benchmarks of a dense node have in common: images of small files, pulls, and a daemon's memory. Sourced by them, after
# benches/cold_start/lib.sh and benches/faces/images.sh.
# shellcheck shell=bash

# snapshotter_of DIR: of the directory below $WORK.
snapshotter_of() { if [ "$1" = overlayfs ]; then echo overlayfs; else echo lazuli; fi; }

# containers DIR COMMAND...: the tool, for the containerd of that directory.
containers() {
    local dir=$1
    shift
    "$BIN/examples/containers" --address "$WORK/$dir/containerd.sock" --snapshotter "$(snapshotter_of "$dir")" "$@"
}

# pull DIR NAME:TAG
pull() {
    local dir=$1 reference=$REGISTRY/$2
    if [ "$dir" = overlayfs ]; then
        ctr --address "$WORK/$dir/containerd.sock" images pull --plain-http --snapshotter overlayfs "$reference"
    else
        "$BIN/lazuli" pull --quiet --config "$WORK/$dir/lazuli.toml" "$reference"
    fi >>"$WORK/$dir/pull.log" 2>&1 || die "pulling $reference failed in $dir"
}

# small_files DIR COUNT FIRST: so many files of one line each, no two alike while FIRST moves on by COUNT.
small_files() {
    mkdir -p "$1"
    seq -f 'file number %012.0f' "$3" $(($3 + $2 - 1)) | split -l 1 -a 6 -d - "$1/file-"
}

# image_of_small_files NAME:TAG LAYERS FILES NUMBER: an image of so many layers of so many files each; another NUMBER, other files.
#
# In memory: where a disk is told of each block that gets free, it takes a millisecond to remove a file.
image_of_small_files() {
    local name=$1 layers=$2 files=$3 number=$4 dir=$WORK/small/files layer tars=()
    mkdir -p "$WORK/small"
    mountpoint -q "$WORK/small" || mount -t tmpfs -o mode=700 small "$WORK/small"
    for ((layer = 0; layer < layers; layer++)); do
        rm -rf "$dir"
        mkdir "$dir"
        small_files "$dir/usr/share/part-$number-$layer" "$files" $(((number * layers + layer) * files))
        tar -C "$dir" --sort=name --numeric-owner -cf "$WORK/small-$layer.tar" .
        tars+=("$WORK/small-$layer.tar")
    done
    write_image "$name" "${tars[@]}"
}

# settle: waits until no segment is being made.
SETTLE_DEADLINE=120 # seconds
settle() {
    local end=$((SECONDS + SETTLE_DEADLINE))
    until "$BIN/lazuli" status --config "$WORK/lazuli/lazuli.toml" --json | jq -e '[.chains[].state] | all(. == "stored")' >/dev/null; do
        [ $SECONDS -lt $end ] || die "the segments are not there after $SETTLE_DEADLINE s"
        sleep 0.5
    done
}

# resident PID: KiB in memory that are the daemon's own, and KiB of files that it has mapped, its program included: of the supervisor PID and
# its worker.
resident() {
    local pid files=()
    for pid in "$1" $(cat "/proc/$1/task/$1/children"); do
        files+=("/proc/$pid/status")
    done
    awk '$1 == "RssAnon:" { own += $2 } $1 == "RssFile:" { files += $2 } END { print own, files }' "${files[@]}"
}
