# One measurement: an image is pulled, its container created, run until it is ready, run once more, and read as a whole. Sourced by the scripts.
# shellcheck shell=bash
# Expects BIN, TARGET, COMMAND, READY and RUN_DEADLINE; lib.sh comes before.

seconds() { jq -n "($2 - $1) * 1000 | round / 1000"; }

# A stock ctr of 2.x pulls lazily; with 1.x it is lazuli pull that does.
choose_containerd() {
    local dir=$TARGET/containerd2
    CONTAINERD_PATH=$PATH
    if [ -n "${CONTAINERD_BIN:-}" ]; then
        CONTAINERD_PATH=$CONTAINERD_BIN:$PATH
    elif [ "${CONTAINERD:-2}" = 2 ] && [ -x tests/support/get-containerd2 ] && tests/support/get-containerd2 "$dir" >>"$(build_log)" 2>&1; then
        CONTAINERD_PATH=$dir/usr/bin:$PATH
    elif [ "${CONTAINERD:-2}" = 2 ] && ! pulls_lazily "$PATH"; then
        say "ATTENTION: containerd 2.x cannot be had here; going on with $(containerd_version "$PATH")"
    fi
    if pulls_lazily "$CONTAINERD_PATH"; then
        PULLER="ctr images pull"
    else
        PULLER="lazuli pull"
    fi
    say "containerd $(containerd_version "$CONTAINERD_PATH"); lazily pulled with: $PULLER"
}

pull() {
    local snapshotter=$1 dir=$2 reference=$3
    case $snapshotter in
        lazuli)
            if [ "$PULLER" = "lazuli pull" ]; then
                "$BIN/lazuli" pull --config "$dir/lazuli.toml" "$reference"
                return
            fi ;;
        stargz)
            if [ "$PULLER" = "lazuli pull" ]; then
                ctr-remote --address "$dir/containerd.sock" images rpull --plain-http "$reference"
                return
            fi ;;
    esac
    "${CTR[@]}" images pull --plain-http --snapshotter "$snapshotter" "$reference"
}

# Starts the container, and returns when it is ready. Its output goes to FILE.
start_until_ready() {
    local id=$1 file=$2 pattern=${READY:-} line output pid status=0
    if [ -z "$pattern" ] && [ -n "${IMAGE:-}" ] && [ -z "${CMD:-}" ]; then
        pattern=.
    fi
    exec {output}< <(exec timeout $RUN_DEADLINE "${CTR[@]}" tasks start "$id" </dev/null 2>&1)
    pid=$!
    while read -r -t $RUN_DEADLINE -u "$output" line; do
        printf '%s\n' "$line" >>"$file"
        if [ -n "$pattern" ] && [[ $line =~ $pattern ]]; then
            exec {output}<&-
            return
        fi
    done
    wait $pid || status=$?
    exec {output}<&-
    [ $status = 0 ] || die "the container's command failed ($status): $(tail -n 3 "$file")"
}

# tree_digest DIR LISTING: everything in a tree that a container can see, as one digest. What eStargz adds to a layer for
# itself does not count.
tree_digest() {
    (
        cd "$1"
        eStargz=(! -path ./stargz.index.json ! -path ./.no.prefetch.landmark ! -path ./.prefetch.landmark)
        find . -xdev "${eStargz[@]}" -printf '%P %y %m %U %G %l' \( -type f -printf ' %s %n %T@' -o -true \) -printf '\n' | sort
        find . -xdev "${eStargz[@]}" -type f -print0 | sort -z | xargs -0 -r -n 256 -P 2 sha256sum | sort -k 2
    ) | tee "$2" | sha256sum | cut -d ' ' -f 1
}

# learn DIR REFERENCE: has Lazuli find out what a start reads; then the image, and all that is here of it, goes.
learn() {
    local dir=$1 reference=$2 end=$((SECONDS + START_DEADLINE * 3)) address
    pull lazuli "$dir" "$reference" >"$dir/learn.log" 2>&1
    "${CTR[@]}" containers create --snapshotter lazuli -- "$reference" demo "${COMMAND[@]}" >>"$dir/learn.log" 2>&1
    start_until_ready demo "$dir/learn.log"
    address=$(sed -n 's/^admin_address = "\(.*\)"/\1/p' "$dir/lazuli.toml")
    until curl -fsS "http://$address/metrics" | grep -q '^lazuli_trace_starts_total{outcome="recorded"} [1-9]'; do
        [ $SECONDS -lt $end ] || die "nothing was learned of $reference"
        sleep 0.2
    done
    timeout 30 "${CTR[@]}" tasks delete --force demo >/dev/null 2>&1 || true
    "${CTR[@]}" containers delete demo >>"$dir/learn.log" 2>&1
    "${CTR[@]}" images rm --sync "$reference" >>"$dir/learn.log" 2>&1
    kill -INT "$LAZULI"
    while kill -0 "$LAZULI" 2>/dev/null; do sleep 0.05; done
    rm -rf --one-file-system "$dir/lazuli/layers"
    start_lazuli "$dir" auto ""
    # containerd pauses before it looks for it again.
    until_true "containerd's way to lazuli" $PID "${CTR[@]}" snapshots --snapshotter lazuli ls
}

# measure FORMAT SNAPSHOTTER ROUND [learned | unwalked]: appends one JSON line to the results.
measure() {
    local format=$1 snapshotter=$2 round=$3 dir=$WORK/$1-$2-$3 reference=$LINK/$REPOSITORY:$1 known=${4:-}
    local begin pulled created ready again_begin again_end read_begin read_end bytes0 bytes1 bytes2 requests0 requests1 digest
    mkdir -p "$dir"
    [ "$snapshotter" = overlayfs ] || "start_$snapshotter" "$dir" auto "$([ "$known" != unwalked ] || printf '[trace]\nwalk = false')"
    start_containerd "$dir" "$CONTAINERD_PATH" "$snapshotter"
    [ "$known" != learned ] || learn "$dir" "$reference"
    sync
    bytes0=$(link_bytes) requests0=$(requests)

    begin=$EPOCHREALTIME
    pull "$snapshotter" "$dir" "$reference" >"$dir/pull.log" 2>&1 || die "pulling $reference with $snapshotter failed"
    pulled=$EPOCHREALTIME
    "${CTR[@]}" containers create --snapshotter "$snapshotter" -- "$reference" demo "${COMMAND[@]}" >"$dir/create.log" 2>&1 ||
        die "creating a container of $reference with $snapshotter failed"
    created=$EPOCHREALTIME
    start_until_ready demo "$dir/output.log"
    ready=$EPOCHREALTIME

    # The access log line of an answer is written just after its last byte.
    sleep 0.1
    bytes1=$(link_bytes) requests1=$(requests)
    timeout 30 "${CTR[@]}" tasks delete --force demo >/dev/null 2>&1 || true
    "${CTR[@]}" containers delete demo >>"$dir/create.log" 2>&1 || die "the first container of $reference cannot be deleted"
    again_begin=$EPOCHREALTIME
    "${CTR[@]}" containers create --snapshotter "$snapshotter" -- "$reference" demo "${COMMAND[@]}" >>"$dir/create.log" 2>&1 ||
        die "creating a second container of $reference with $snapshotter failed"
    start_until_ready demo "$dir/again.log"
    again_end=$EPOCHREALTIME
    mkdir "$dir/view"
    "${CTR[@]}" images mount --snapshotter "$snapshotter" "$reference" "$dir/view" >"$dir/mount.log" 2>&1 ||
        die "mounting $reference with $snapshotter failed"
    read_begin=$EPOCHREALTIME
    digest=
    [ "${FULL:-1}" = 0 ] || digest=$(tree_digest "$dir/view" "$WORK/tree-$format-$snapshotter")
    read_end=$EPOCHREALTIME
    bytes2=$(link_bytes)

    jq -cn --arg format "$format" --arg snapshotter "$snapshotter${known:+-$known}" --arg digest "$digest" \
        --argjson pull "$(seconds "$begin" "$pulled")" --argjson create "$(seconds "$pulled" "$created")" \
        --argjson run "$(seconds "$created" "$ready")" --argjson ready "$(seconds "$begin" "$ready")" \
        --argjson again "$(seconds "$again_begin" "$again_end")" --arg image "${NAME:-}" --arg profile "${PROFILE:-}" \
        --argjson bytes $((bytes1 - bytes0)) --argjson requests $((requests1 - requests0)) \
        --argjson full "$(seconds "$read_begin" "$read_end")" --argjson all_bytes $((bytes2 - bytes0)) \
        '{$profile, $image, $format, $snapshotter, $pull, $create, $run, $ready, $again, $bytes, $requests, $full, $all_bytes, $digest}' >>"$RESULTS"
    if [ "$round" = 1 ]; then
        printf '%s/%s: %s\n' "$format" "$snapshotter" "$(tail -n 1 "$dir/output.log" | cut -c 1-100)"
        if [ "$snapshotter" = lazuli ]; then
            "$BIN/lazuli" status --config "$dir/lazuli.toml" | sed 's/^/    /' | head -n 20
        fi
    fi

    timeout 10 umount "$dir/view" || true
    timeout 10 "${CTR[@]}" tasks delete --force demo >/dev/null 2>&1 || true
    clear_dir "$dir"
}

