# One measurement: an image is pulled, its container created, run until it is ready, run once more, and read as a whole. Sourced by the scripts.
# shellcheck shell=bash
# Expects BIN, TARGET, COMMAND, READY and RUN_DEADLINE; lib.sh comes before.

# runc's state is one for all containerds of a machine.
CONTAINER=cold-$$

seconds() { jq -n "($2 - $1) * 1000 | round / 1000"; }

# What everything is compared with: the newest long-term release of containerd (REFERENCE=1 builds it if need be), or else a 2.x, of which a stock
# ctr pulls lazily; with 1.x it is lazuli pull that does. Sets CONTAINERD_PATH and PULLER.
choose_containerd() {
    local lts=$TARGET/containerd-lts dir=$TARGET/containerd2
    CONTAINERD_PATH=$PATH
    if [ -n "${CONTAINERD_BIN:-}" ]; then
        [ -x "$CONTAINERD_BIN/containerd" ] && [ -x "$CONTAINERD_BIN/ctr" ] || die "there is no containerd, or no ctr, in CONTAINERD_BIN=$CONTAINERD_BIN"
        CONTAINERD_PATH=$CONTAINERD_BIN:$PATH
    elif [ "${CONTAINERD:-2}" = 2 ]; then
        if [ -x "$lts/bin/ctr" ] || { [ -n "${REFERENCE:-}" ] && get_reference "$lts"; }; then
            CONTAINERD_PATH=$lts/bin:$PATH
        elif [ -x tests/support/get-containerd2 ] && tests/support/get-containerd2 "$dir" >>"$(build_log)" 2>&1; then
            CONTAINERD_PATH=$dir/usr/bin:$PATH
        elif ! pulls_lazily "$PATH"; then
            say "ATTENTION: containerd 2.x cannot be had here; going on with $(containerd_version "$PATH")"
        fi
    fi
    if pulls_lazily "$CONTAINERD_PATH"; then
        PULLER="ctr images pull"
    else
        PULLER="lazuli pull"
    fi
    say "containerd $(containerd_version "$CONTAINERD_PATH"); lazily pulled with: $PULLER"
}

get_reference() {
    say "building containerd's long-term release (once; takes some minutes)"
    benches/cold_start/get-containerd "$1" >>"$(build_log)" 2>&1 && return
    say "ATTENTION: $(tail -n 1 "$(build_log)"); comparing with an older one"
    return 1
}

# choose_erofs: containerd's EROFS snapshotter as well, where this containerd has it, the kernel mounts EROFS, and there is a mkfs.erofs for it.
# Succeeds if so.
choose_erofs() {
    local bin
    case $(containerd_version "$CONTAINERD_PATH") in 1.* | 2.0.*) return 1 ;; esac
    if ! grep -qw erofs /proc/filesystems && ! modprobe erofs 2>>"$(build_log)"; then
        say "no rows for containerd's EROFS snapshotter: the kernel has no EROFS"
        return 1
    fi
    if ! bin=$(benches/cold_start/get-erofs-utils "$TARGET/erofs-utils" 2>>"$(build_log)"); then
        say "no rows for containerd's EROFS snapshotter: $(tail -n 1 "$(build_log)")"
        return 1
    fi
    CONTAINERD_PATH=$CONTAINERD_PATH:$bin
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
    local id=$1 file=$2 pattern=${READY:-} line output pid status=0 end=$((SECONDS + RUN_DEADLINE))
    if [ -z "$pattern" ] && [ -n "${IMAGE:-}" ] && [ -z "${CMD:-}" ]; then
        pattern=.
    fi
    exec {output}< <(exec timeout $RUN_DEADLINE "${CTR[@]}" tasks start "$id" </dev/null 2>&1)
    pid=$!
    while read -r -t $RUN_DEADLINE -u "$output" line; do
        printf '%s\n' "$line" >>"$file"
        [ $SECONDS -lt $end ] || die "the container's command is not ready after $RUN_DEADLINE s: $line"
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

# What Lazuli is told beside what start_lazuli says: MORE_CONFIG of a format.
more_config() {
    MORE_CONFIG=
    # What was indexed by another node is believed of this repository.
    [ "$1" != indexed ] || MORE_CONFIG="[index]
repository = \"$LINK/$INDEXES\""
}

# Where nodes that have streamed an image publish its indexes.
INDEXES=run/index
PUBLISH_DEADLINE=300 # seconds until a node has streamed an image and published its indexes
LEAST_INDEXED=262144 # bytes of the smallest blob that is indexed

# publish REPOSITORY: a node streams its tag "plain", and publishes what it has found out. A layer that another image has as well may be indexed already.
publish() {
    local dir=$WORK/publish LINK=$REGISTRY end=$((SECONDS + PUBLISH_DEADLINE))
    mkdir -p "$dir"
    start_lazuli "$dir" auto "[index]
repository = \"$REGISTRY/$INDEXES\"
publish = true"
    start_containerd "$dir" "$CONTAINERD_PATH" lazuli
    pull lazuli "$dir" "$REGISTRY/$1:plain" >"$dir/pull.log" 2>&1 || die "pulling $1 in order to index it failed"
    until "$BIN/lazuli" status --json --config "$dir/lazuli.toml" |
        jq -e --argjson least $LEAST_INDEXED '[.layers[] | select(.blob_bytes >= $least)] | length > 0 and all(.index.published or .index.source == "shared")' >/dev/null; do
        [ $SECONDS -lt $end ] || die "the indexes of $1 were not published within $PUBLISH_DEADLINE s"
        sleep 0.2
    done
    clear_dir "$dir"
}

# view_any DIR SNAPSHOTTER REFERENCE: the image's tree on DIR/view.
view_any() { "${CTR[@]}" images mount --snapshotter "$2" "$3" "$1/view"; }

# The same for containerd's EROFS snapshotter, as that does it for a container. (ctr images mount makes containerd 2.3.7 panic there: it counts the
# overlay among the temporary mounts.)
view_erofs() {
    local dir=$1 file number lower=
    # Layers are committed one after the other, so that their numbers rise.
    for file in $(cd "$dir/containerd/io.containerd.snapshotter.v1.erofs/snapshots" && ls -v -- */layer.erofs); do
        number=${file%/*}
        mkdir -p "$dir/l/$number"
        mount -t erofs -o ro "$dir/containerd/io.containerd.snapshotter.v1.erofs/snapshots/$file" "$dir/l/$number" || return
        lower=$number${lower:+:$lower}
    done
    # Short names, and mount(2): its options have a page.
    (cd "$dir/l" && LIBMOUNT_FORCE_MOUNT2=always mount -t overlay -o "ro,lowerdir=$lower" overlay "$dir/view")
}

# learn DIR REFERENCE: has Lazuli find out what a start reads; then the image, and all that is here of it, goes.
learn() {
    local dir=$1 reference=$2 end=$((SECONDS + START_DEADLINE * 3)) address
    pull lazuli "$dir" "$reference" >"$dir/learn.log" 2>&1
    "${CTR[@]}" containers create --snapshotter lazuli -- "$reference" "$CONTAINER-seen" "${COMMAND[@]}" >>"$dir/learn.log" 2>&1
    start_until_ready "$CONTAINER-seen" "$dir/learn.log"
    address=$(sed -n 's/^admin_address = "\(.*\)"/\1/p' "$dir/lazuli.toml")
    until curl -fsS "http://$address/metrics" | grep '^lazuli_trace_starts_total{outcome="recorded"} [1-9]' >/dev/null; do
        [ $SECONDS -lt $end ] || die "nothing was learned of $reference"
        sleep 0.2
    done
    timeout 30 "${CTR[@]}" tasks delete --force "$CONTAINER-seen" >/dev/null 2>&1 || true
    "${CTR[@]}" containers delete "$CONTAINER-seen" >>"$dir/learn.log" 2>&1
    "${CTR[@]}" images rm --sync "$reference" >>"$dir/learn.log" 2>&1
    kill -INT "$LAZULI"
    while kill -0 "$LAZULI" 2>/dev/null; do sleep 0.05; done
    rm -rf --one-file-system "$dir/lazuli/layers"
    start_lazuli "$dir" auto "$MORE_CONFIG"
    # containerd pauses before it looks for it again.
    until_true "containerd's way to lazuli" $PID "${CTR[@]}" snapshots --snapshotter lazuli ls
}

# measure FORMAT SNAPSHOTTER ROUND [learned|earlier|unwalked|other|second]: appends one JSON line to the results. learned: by a node that has seen the image start
# before, and has nothing of it any more; earlier: by one that has seen the image of an earlier tag; unwalked: nothing is guessed; other: another command (OTHER) is started;
# second: the same by a node that has learned how COMMAND starts. The format "indexed" is the plain image, of which the node finds indexes that another one has published.
measure() {
    local format=$1 snapshotter=$2 round=$3 dir=$WORK/$1-$2-$3 reference=$LINK/$REPOSITORY:$1 known=${4:-} seen
    local begin pulled created ready again_begin again_end read_begin read_end bytes0 bytes1 bytes2 requests0 requests1 requests2 digest
    [ "$format" != indexed ] || reference=$LINK/$REPOSITORY:plain
    seen=$reference
    [ "$known" != earlier ] || seen=$reference-earlier
    mkdir -p "$dir"
    more_config "$format"
    [ "$known" != unwalked ] || MORE_CONFIG+=$'\n[trace]\nwalk = false\n'
    case $snapshotter in
        overlayfs | erofs) ;;
        lazuli) start_lazuli "$dir" auto "$MORE_CONFIG" ;;
        *) "start_$snapshotter" "$dir" "$format" ;;
    esac
    start_containerd "$dir" "$CONTAINERD_PATH" "$snapshotter"
    case $known in learned | earlier | second) learn "$dir" "$seen" ;; esac
    local COMMAND=("${COMMAND[@]}") READY=${READY:-}
    case $known in other | second) COMMAND=("${OTHER[@]}") READY= ;; esac
    sync
    bytes0=$(link_bytes) requests0=$(requests)

    begin=$EPOCHREALTIME
    pull "$snapshotter" "$dir" "$reference" >"$dir/pull.log" 2>&1 || die "pulling $reference with $snapshotter failed"
    pulled=$EPOCHREALTIME
    "${CTR[@]}" containers create --snapshotter "$snapshotter" -- "$reference" "$CONTAINER" "${COMMAND[@]}" >"$dir/create.log" 2>&1 ||
        die "creating a container of $reference with $snapshotter failed"
    created=$EPOCHREALTIME
    start_until_ready "$CONTAINER" "$dir/output.log"
    ready=$EPOCHREALTIME

    # The access log line of an answer is written just after its last byte.
    sleep 0.1
    bytes1=$(link_bytes) requests1=$(requests)
    timeout 30 "${CTR[@]}" tasks delete --force "$CONTAINER" >/dev/null 2>&1 || true
    "${CTR[@]}" containers delete "$CONTAINER" >>"$dir/create.log" 2>&1 || die "the first container of $reference cannot be deleted"
    # Under another name: containerd 2.3 may take what is still mounted for the first one, as it is taken away, for the second.
    again_begin=$EPOCHREALTIME
    "${CTR[@]}" containers create --snapshotter "$snapshotter" -- "$reference" "$CONTAINER-again" "${COMMAND[@]}" >>"$dir/create.log" 2>&1 ||
        die "creating a second container of $reference with $snapshotter failed"
    start_until_ready "$CONTAINER-again" "$dir/again.log"
    again_end=$EPOCHREALTIME
    mkdir "$dir/view"
    "view_$([ "$snapshotter" = erofs ] && echo erofs || echo any)" "$dir" "$snapshotter" "$reference" >"$dir/mount.log" 2>&1 ||
        die "mounting $reference with $snapshotter failed"
    read_begin=$EPOCHREALTIME
    digest=
    [ "${FULL:-1}" = 0 ] || digest=$(tree_digest "$dir/view" "$WORK/tree-${NAME:+$NAME-}$format-$snapshotter")
    read_end=$EPOCHREALTIME
    bytes2=$(link_bytes) requests2=$(requests)

    jq -cn --arg format "$format" --arg snapshotter "$snapshotter${known:+-$known}" --arg digest "$digest" \
        --argjson pull "$(seconds "$begin" "$pulled")" --argjson create "$(seconds "$pulled" "$created")" \
        --argjson run "$(seconds "$created" "$ready")" --argjson ready "$(seconds "$begin" "$ready")" \
        --argjson again "$(seconds "$again_begin" "$again_end")" --arg image "${NAME:-}" --arg profile "${PROFILE:-}" \
        --argjson bytes $((bytes1 - bytes0)) --argjson requests $((requests1 - requests0)) \
        --argjson full "$(seconds "$read_begin" "$read_end")" --argjson all_bytes $((bytes2 - bytes0)) \
        --argjson all_requests $((requests2 - requests0)) \
        '{$profile, $image, $format, $snapshotter, $pull, $create, $run, $ready, $again, $bytes, $requests, $full, $all_bytes, $all_requests, $digest}' >>"$RESULTS"
    if [ "$round" = 1 ]; then
        printf '%s/%s: %s\n' "$format" "$snapshotter" "$(tail -n 1 "$dir/output.log" | cut -c 1-100)"
        if [ "$snapshotter" = lazuli ]; then
            "$BIN/lazuli" status --config "$dir/lazuli.toml" | sed 's/^/    /' | head -n 20
        fi
    fi

    timeout 10 umount "$dir/view" || true
    timeout 10 "${CTR[@]}" tasks delete --force "$CONTAINER-again" >/dev/null 2>&1 || true
    clear_dir "$dir"
}

