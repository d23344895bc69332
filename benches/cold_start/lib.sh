# Parts of the benchmarks with containers: one temporary root, the processes in it, and their end. Sourced by the scripts called run.
# shellcheck shell=bash

# What the user reads goes to the terminal also from steps whose output is kept in a log.
exec {TERMINAL}>&2
say() { printf '%s\n' "$*" >&"$TERMINAL"; }
die() { say "${PROGRAM:-demo}: $*"; exit 1; }

# --- the temporary root -------------------------------------------------------------------------------------------------

# Everything that is started has this path on its command line, everything that is mounted is below it, and nothing else is.
WORK=

open_workspace() {
    # Not /tmp, which is in memory on many machines; and short, for a socket's path has at most 107 bytes.
    WORK=$(mktemp -d /var/tmp/lazuli-demo.XXXXXX)
    chmod 700 "$WORK"
    trap close_workspace EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # containerd cannot keep its state on overlayfs (inside a container without a volume).
    if [ "$(stat -f -c %T "$WORK")" = overlayfs ]; then
        die "/var/tmp is on overlayfs, and overlayfs cannot be stacked on itself: mount a volume at /var/tmp"
    fi
}

# Ends every process that carries the temporary root on its command line: the daemons, and shims that outlived containerd.
end_processes() {
    local signal=$1 dir=$2 file pid found=1
    for file in /proc/[0-9]*/cmdline; do
        pid=${file#/proc/}
        pid=${pid%/cmdline}
        if [ "$pid" != $$ ] && [ "$pid" != $BASHPID ] && tr '\0' ' ' 2>/dev/null <"$file" | grep -qF "$dir/"; then
            kill "-$signal" "$pid" 2>/dev/null && found=0
        fi
    done
    return $found
}

unmount_below() {
    local dir=$1 target
    # The last mounted first. Lazily: a FUSE mount whose server is gone would block.
    awk -v dir="$dir/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac | while read -r target; do
        umount -l "$target" 2>/dev/null || true
    done
}

# Removes a directory below the temporary root, with whatever still runs or is mounted in it.
clear_dir() {
    local dir=$1 attempt file bundle
    case $dir in "$WORK"*) ;; *) die "$dir is not below the temporary root" ;; esac
    # A container's first process outlives its shim, and what runc remembers of it outlives both.
    for file in "$dir"/{,*/}state/io.containerd.runtime.v2.task/*/*/init.pid; do
        [ -e "$file" ] || continue
        kill -KILL "$(cat "$file")" 2>/dev/null || true
        bundle=${file%/init.pid}
        timeout 10 runc --root "/run/containerd/runc/$(basename "$(dirname "$bundle")")" delete --force "${bundle##*/}" 2>/dev/null || true
    done
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        end_processes "$([ "$attempt" -lt 5 ] && echo TERM || echo KILL)" "$dir" || break
        sleep 0.2
    done
    unmount_below "$dir"
    rm -rf --one-file-system "$dir"
}

close_workspace() {
    local status=$?
    trap '' INT TERM HUP
    if [ -n "$WORK" ] && [ -d "$WORK" ]; then
        if [ $status -ne 0 ] && [ $status -lt 128 ]; then
            say "${PROGRAM:-demo}: failed; the last lines of the logs:"
            find "$WORK" -maxdepth 2 -name '*.log' -size +0 -exec tail -n 5 {} + >&2 || true
            # The machine of a developer who wants to see all of it.
            if [ -n "${KEEP_LOGS:-}" ]; then
                mkdir -p "$KEEP_LOGS"
                (cd "$WORK" && find . -maxdepth 2 -name '*.log' -exec cp --parents {} "$KEEP_LOGS" \;)
            fi
        fi
        clear_dir "$WORK"
    fi
    exit $status
}

# --- waiting, with a deadline -------------------------------------------------------------------------------------------

START_DEADLINE=20 # seconds for a daemon to come up; takes well under one

# until_true WHAT PID COMMAND...: waits until COMMAND succeeds; fails when process PID ends or the deadline passes.
until_true() {
    local what=$1 pid=$2 end=$((SECONDS + START_DEADLINE))
    shift 2
    until "$@" >/dev/null 2>&1; do
        kill -0 "$pid" 2>/dev/null || die "$what ended at once"
        [ $SECONDS -lt $end ] || die "$what did not come up within $START_DEADLINE s"
        sleep 0.02
    done
}

# A TCP port that nobody listens on. Only where a program cannot choose one by itself.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 10000))
        if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo $port
            return
        fi
    done
}

# In a session of its own: Ctrl-C reaches this script, which then ends the daemons in the right order.
daemon() {
    local log=$1
    shift
    setsid "$@" </dev/null >"$log" 2>&1 &
    PID=$!
}

# --- registry and link --------------------------------------------------------------------------------------------------

# start_registry STORAGE: sets REGISTRY (host:port) and ACCESS_LOG.
start_registry() {
    local dir=$WORK/registry
    mkdir -p "$dir" "$1"
    ACCESS_LOG=$dir/access
    cat >"$dir/config.yml" <<EOF
version: 0.1
log: {level: info, accesslog: {disabled: false}}
storage: {filesystem: {rootdirectory: $1}, delete: {enabled: true}}
http: {addr: "127.0.0.1:0", secret: demo}
EOF
    setsid docker-registry serve "$dir/config.yml" </dev/null >"$ACCESS_LOG" 2>"$dir/registry.log" &
    PID=$!
    # The first is what docker-registry 2 prints; it may be quoted within a longer line.
    until_true docker-registry $PID grep -qE 'listening on 127' "$dir/registry.log" "$ACCESS_LOG"
    REGISTRY=$(grep -ohE 'listening on 127[0-9.]*:[0-9]+' "$dir/registry.log" "$ACCESS_LOG" | head -n 1 | cut -d ' ' -f 3)
}

# start_link: sets LINK (host:port of the slow way to the registry) and LINK_STATS. RTT, MBIT and CONNECTION_MBIT say how slow it is. One that was
# started before ends.
start_link() {
    local dir=$WORK/link
    [ ! -e "$dir" ] || clear_dir "$dir"
    mkdir -p "$dir"
    cp "$BIN/examples/link" "$dir/link"
    daemon "$dir/link.log" "$dir/link" --to "$REGISTRY" --rtt "$RTT" --mbit "$MBIT" --connection-mbit "${CONNECTION_MBIT:-0}"
    until_true link $PID grep -q '^stats ' "$dir/link.log"
    LINK=$(sed -n 's/^link //p' "$dir/link.log")
    LINK_STATS=$(sed -n 's/^stats //p' "$dir/link.log")
}

# Bytes that came out of the registry's end of the link so far.
link_bytes() {
    local line
    read -r line <"/dev/tcp/${LINK_STATS%:*}/${LINK_STATS#*:}"
    line=${line##*\"down\":}
    echo "${line%\}}"
}

# Requests that the registry has answered so far.
requests() { grep -c '" [1-5][0-9][0-9] ' "$ACCESS_LOG" || true; }

# --- containerd and snapshotters ----------------------------------------------------------------------------------------

# start_containerd DIR PATH SNAPSHOTTER [DIFFER]: containerd of PATH, with its root and state in DIR; layers of the snapshotter are applied by
# DIFFER, if it is a 2.x: if none is stated by what deploy/containerd, or EROFS' documentation, has for it. overlayfs and erofs are containerd's own, every
# other snapshotter is a proxy with a socket in DIR. Sets CTR.
start_containerd() {
    local dir=$1 path=$2 snapshotter=$3 differ=${4:-} name
    if [ -z "$differ" ]; then
        case $snapshotter-$(containerd_major "$path") in
            erofs-*) differ=erofs ;;
            lazuli-1) differ=walking ;;
            lazuli-*) differ=lazuli-diff ;;
            *) differ=walking ;;
        esac
    fi
    mkdir -p "$dir"
    {
        if [ "$(containerd_major "$path")" = 1 ]; then
            cat <<EOF
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
EOF
        else
            cat <<EOF
version = 3
disabled_plugins = ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"]
EOF
        fi
        cat <<EOF
root = "$dir/containerd"
state = "$dir/state"
[grpc]
  address = "$dir/containerd.sock"
EOF
        # The first entry replaces the default list, so overlayfs has to be repeated.
        if [ "$(containerd_major "$path")" != 1 ] && [ "$snapshotter" != overlayfs ]; then
            for name in "$snapshotter" overlayfs; do
                cat <<EOF
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "$name"
  differ = "$(if [ "$name" = overlayfs ]; then echo walking; else echo "$differ"; fi)"
EOF
            done
        fi
        if [ "$snapshotter" = erofs ]; then
            # What its documentation asks for, and advises for speed.
            cat <<EOF
[plugins."io.containerd.service.v1.diff-service"]
  default = ["erofs", "walking"]
[plugins."io.containerd.differ.v1.erofs"]
  mkfs_options = ["-T0", "--mkfs-time", "--sort=none"]
EOF
        elif [ "$differ" != walking ]; then
            cat <<EOF
[proxy_plugins.$differ]
  type = "diff"
  address = "$dir/$snapshotter.sock"
EOF
        fi
        if [ "$snapshotter" != overlayfs ] && [ "$snapshotter" != erofs ]; then
            cat <<EOF
[proxy_plugins.$snapshotter]
  type = "snapshot"
  address = "$dir/$snapshotter.sock"
  [proxy_plugins.$snapshotter.exports]
    root = "$dir/$snapshotter"
    enable_remote_snapshot_annotations = "true"
EOF
        fi
    } >"$dir/containerd.toml"
    PATH=$path daemon "$dir/containerd.log" containerd --config "$dir/containerd.toml"
    CTR=(env "PATH=$path" ctr --address "$dir/containerd.sock")
    until_true containerd $PID "${CTR[@]}" version
}

# start_lazuli DIR [FACE [MORE [HOSTS]]]: sets LAZULI, its process. It asks the registry by way of $LINK. MORE are lines of its configuration, HOSTS a quoted directory of
# hosts.toml files.
start_lazuli() {
    local dir=$1
    cat >"$dir/lazuli.toml" <<EOF
root = "$dir/lazuli"
address = "$dir/lazuli.sock"
containerd_address = "$dir/containerd.sock"
admin_address = "127.0.0.1:$(free_port)"
[registry]
config_path = [${4:-}]
# containerd's label of a layer's origin has no port.
[registry.hosts]
"127.0.0.1" = ["$LINK"]
[fuse]
face = "${2:-auto}"
${3:-}
EOF
    daemon "$dir/lazuli.log" "$BIN/lazuli" serve --config "$dir/lazuli.toml"
    LAZULI=$PID
    until_true lazuli $PID test -S "$dir/lazuli.sock"
}

# start_stargz DIR: the stargz snapshotter, where somebody has installed it.
start_stargz() {
    local dir=$1
    printf '[snapshotter]\n' >"$dir/stargz.toml"
    daemon "$dir/stargz.log" containerd-stargz-grpc --address "$dir/stargz.sock" --root "$dir/stargz" --config "$dir/stargz.toml"
    until_true containerd-stargz-grpc $PID test -S "$dir/stargz.sock"
}

# start_soci DIR FORMAT: the SOCI snapshotter, where somebody has installed it. Plain images it pulls in parallel, as its documentation shows that; others by
# their index.
start_soci() {
    local dir=$1
    {
        # It asks containerd for manifests in either case.
        printf '[content_store]\n  type = "%s"\n  containerd_address = "%s"\n' "$([ "$2" = plain ] && echo containerd || echo soci)" "$dir/containerd.sock"
        if [ "$2" = plain ]; then
            cat <<EOF
[pull_modes.parallel_pull_unpack]
  enable = true
  max_concurrent_downloads = 50
  max_concurrent_downloads_per_image = 10
  concurrent_download_chunk_size = "8mb"
  max_concurrent_unpacks = 20
  max_concurrent_unpacks_per_image = 10
  discard_unpacked_layers = true
EOF
        fi
    } >"$dir/soci.toml"
    daemon "$dir/soci.log" soci-snapshotter-grpc --address "$dir/soci.sock" --root "$dir/soci" --config "$dir/soci.toml"
    until_true soci-snapshotter-grpc $PID test -S "$dir/soci.sock"
}

# The version of the containerd that PATH $1 finds: the third word, with or without a "v".
containerd_version() {
    local words
    read -ra words < <(PATH=$1 containerd --version)
    echo "${words[2]#v}"
}
containerd_major() {
    local version
    version=$(containerd_version "$1")
    echo "${version%%.*}"
}

# Whether ctr of PATH $1 pulls through the transfer service, which asks the snapshotter before it downloads (since 2.0.1).
pulls_lazily() {
    case $(containerd_version "$1") in 0.* | 1.* | 2.0.0*) return 1 ;; *) return 0 ;; esac
}
