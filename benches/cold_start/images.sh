# The images of the cold-start demo, in the storage directory of a registry that is kept between runs. Sourced by run.
# shellcheck shell=bash

# Changes whenever the recipe below changes, so that kept images are built anew.
RECIPE=1

# The file that every image tool writes its progress to.
build_log() { echo "$WORK/build.log"; }

# has REPOSITORY:TAG: whether the registry holds it.
has() {
    curl -fsS -o /dev/null -H 'Accept: application/vnd.oci.image.manifest.v1+json' -H 'Accept: application/vnd.oci.image.index.v1+json' \
        -H 'Accept: application/vnd.docker.distribution.manifest.v2+json' \
        "http://$REGISTRY/v2/${1%:*}/manifests/${1##*:}" 2>/dev/null
}

# bootstrap ROOT: Debian's minimal base system, of this machine's own release, from its own mirror.
bootstrap() {
    local root=$1 suite mirror
    suite=${DEMO_SUITE:-$(. /etc/os-release && echo "$VERSION_CODENAME")}
    # shellcheck disable=SC2016  # apt's own variables
    mirror=${DEMO_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $suite" |
        sed -n 's,/*$,,; /^http/p' | head -n 1)}
    say "  from packages of $suite of ${mirror:-the default mirror}"
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" ${mirror:+"$mirror"}
    # debootstrap has /proc mounted while it works, and may leave it so.
    unmount_below "$root"
}

# Python with numpy the way people build it: a base system, Python, tools that only the build needed, numpy, an app.
build_python() {
    local bundle=$WORK/build/bundle layout=$WORK/build/oci
    say "building the image from this distribution's packages (once; takes about two minutes)"

    mkdir -p "$WORK/build"
    umoci init --layout "$layout"
    umoci new --image "$layout:python"
    umoci unpack --image "$layout:python" "$bundle"
    say "  layer 1: Debian's minimal base system"
    bootstrap "$bundle/rootfs"
    pack_layer "$layout:python" "$bundle" "debootstrap"
    say "  layer 2: Python"
    add_packages "$bundle/rootfs" python3
    pack_layer "$layout:python" "$bundle" "python3"
    say "  layer 3: tools that only the build needed"
    add_packages "$bundle/rootfs" python3-dev python3-pip git binutils make
    pack_layer "$layout:python" "$bundle" "python3-dev python3-pip git binutils make"
    say "  layer 4: numpy"
    add_packages "$bundle/rootfs" python3-numpy
    pack_layer "$layout:python" "$bundle" "python3-numpy"
    say "  layer 5: the application"
    mkdir -p "$bundle/rootfs/app"
    cat >"$bundle/rootfs/app/main.py" <<'EOF'
import numpy
print("numpy", numpy.__version__, "sum", int(numpy.arange(1000).sum()))
EOF
    pack_layer "$layout:python" "$bundle" "app"
    umoci config --image "$layout:python" --config.cmd python3 --config.cmd /app/main.py --config.env PATH=/usr/sbin:/usr/bin:/sbin:/bin
    skopeo copy --dest-tls-verify=false "oci:$layout:python" "docker://$REGISTRY/demo/python:plain"
    rm -rf --one-file-system "$WORK/build"
}

# pack_layer IMAGE BUNDLE COMMENT: what changed in the bundle's tree becomes a layer.
pack_layer() {
    rm -rf "$2/rootfs/var/cache/apt"/*.bin "$2/rootfs/var/cache/apt/archives"/*.deb "$2/rootfs/var/log/apt" "$2/rootfs/var/lib/apt/lists"/*
    umoci repack --refresh-bundle --image "$1" --history.created_by "$3" "$2"
}

# add_packages ROOT PACKAGE...
add_packages() {
    local root=$1
    shift
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    # Some packages run what they install, and Java does not without it.
    mount -t proc proc "$root/proc"
    chroot "$root" apt-get -qq update
    DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot "$root" apt-get -qq install -y --no-install-recommends "$@"
    umount -l "$root/proc"
    rm -f "$root/etc/resolv.conf"
}

# convert REPOSITORY [FROM TO]: its tag "plain" becomes eStargz under the tag "estargz".
convert() {
    local dir=$WORK/convert path=$PATH from=$REGISTRY/$1:${2:-plain} to=$REGISTRY/$1:${3:-estargz}
    say "converting $1 to eStargz (once)"
    start_containerd "$dir" "$path" overlayfs
    # Only the blobs: the tool that converts decompresses them itself.
    "${CTR[@]}" content fetch --plain-http --platform "linux/$(go_arch)" "$from"
    ctr-remote --address "$dir/containerd.sock" images convert --estargz --oci "$from" "$to"
    "${CTR[@]}" images push --plain-http "$to"
    clear_dir "$dir"
}

# says_what_it_runs REPOSITORY TAG COMMAND...: the image's config names this command from now on, as images do.
says_what_it_runs() {
    local url=http://$REGISTRY/v2/$1 tag=$2 manifest type config command digest place
    shift 2
    command=$(jq -cn '$ARGS.positional' --args -- "$@")
    manifest=$(curl -fsS -H 'Accept: application/vnd.oci.image.manifest.v1+json' \
        -H 'Accept: application/vnd.docker.distribution.manifest.v2+json' "$url/manifests/$tag")
    config=$(curl -fsS "$url/blobs/$(jq -r .config.digest <<<"$manifest")")
    if jq -e --argjson command "$command" '.config.Cmd == $command' <<<"$config" >/dev/null; then
        return
    fi
    config=$(jq -c --argjson command "$command" '.config.Cmd = $command' <<<"$config")
    digest=sha256:$(printf %s "$config" | sha256sum | cut -d ' ' -f 1)
    place=$(curl -fsS -o /dev/null -D - -X POST "$url/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
    case $place in /*) place=http://$REGISTRY$place ;; esac
    printf %s "$config" | curl -fsS -X PUT -H 'Content-Type: application/octet-stream' --data-binary @- "$place&digest=$digest"
    type=$(jq -r '.mediaType // "application/vnd.oci.image.manifest.v1+json"' <<<"$manifest")
    jq -c --arg digest "$digest" --argjson size "$(printf %s "$config" | wc -c)" '.config.digest = $digest | .config.size = $size' \
        <<<"$manifest" | curl -fsS -X PUT -H "Content-Type: $type" --data-binary @- "$url/manifests/$tag"
}

# chunk REPOSITORY: its tag "plain" becomes zstd:chunked, as podman, buildah and skopeo write it, under the tag "chunked".
chunk() {
    local layout=$WORK/chunked
    say "converting $1 to zstd:chunked (once)"
    # Through a layout: the registry would offer the blobs that it has.
    skopeo copy --src-tls-verify=false --dest-compress-format zstd:chunked "docker://$REGISTRY/$1:plain" "oci:$layout:chunked"
    skopeo copy --dest-tls-verify=false "oci:$layout:chunked" "docker://$REGISTRY/$1:chunked"
    rm -rf --one-file-system "$layout"
}

# This machine's architecture, as images call it.
go_arch() {
    case $(uname -m) in
        x86_64) echo amd64 ;;
        aarch64) echo arm64 ;;
        *) uname -m ;;
    esac
}

# index_soci REPOSITORY: its tag "plain" with a SOCI index (v2) becomes the tag "soci". Spans and least layer are SOCI's own defaults.
index_soci() {
    local dir=$WORK/soci
    say "indexing $1 for SOCI (once)"
    mkdir -p "$dir"
    printf 'root = "%s"\naddress = "%s/lazuli.sock"\n' "$dir/lazuli" "$dir" >"$dir/lazuli.toml"
    "$BIN/lazuli" index --config "$dir/lazuli.toml" --plain-http export "$REGISTRY/$1:plain" --soci v2 --push "$REGISTRY/$1:soci"
    rm -rf --one-file-system "$dir"
}

# rebuild REPOSITORY: the image as an earlier build of it might have been, as eStargz under the tag "estargz-earlier": its uppermost layer has one small
# file more, so that its digest is another one, and every other file of it is the same.
rebuild() {
    local dir=$WORK/rebuild top config diff digest
    say "making an earlier build of $1 (once)"
    skopeo copy --src-tls-verify=false "docker://$REGISTRY/$1:plain" "dir:$dir"
    top=$(jq -r '.layers[-1].digest | split(":")[1]' "$dir/manifest.json")
    config=$(jq -r '.config.digest | split(":")[1]' "$dir/manifest.json")
    gunzip <"$dir/$top" >"$dir/layer"
    mkdir -p "$dir/add/etc"
    echo earlier >"$dir/add/etc/build"
    tar -C "$dir/add" --owner=0 --group=0 --append -f "$dir/layer" etc/build
    diff=$(sha256sum "$dir/layer" | cut -d ' ' -f 1)
    gzip -n "$dir/layer"
    digest=$(sha256sum "$dir/layer.gz" | cut -d ' ' -f 1)
    mv "$dir/layer.gz" "$dir/$digest"
    jq -c --arg diff "sha256:$diff" '.rootfs.diff_ids[-1] = $diff' "$dir/$config" >"$dir/config"
    config=$(sha256sum "$dir/config" | cut -d ' ' -f 1)
    mv "$dir/config" "$dir/$config"
    jq -c --arg layer "sha256:$digest" --argjson layer_size "$(stat -c %s "$dir/$digest")" \
        --arg config "sha256:$config" --argjson config_size "$(stat -c %s "$dir/$config")" \
        '.layers[-1] += {digest: $layer, size: $layer_size} | .config += {digest: $config, size: $config_size}' "$dir/manifest.json" >"$dir/manifest"
    mv "$dir/manifest" "$dir/manifest.json"
    rm -r "$dir/add"
    skopeo copy --dest-tls-verify=false "dir:$dir" "docker://$REGISTRY/$1:plain-earlier"
    rm -rf --one-file-system "$dir"
    convert "$1" plain-earlier estargz-earlier
}

unavailable() { die "$IMAGE cannot be copied: $(tail -n 1 "$(build_log)") (for a private image: skopeo login)"; }

# prepare_images: sets REPOSITORY and FORMATS.
prepare_images() {
    if [ -n "${IMAGE:-}" ]; then
        local verify=true digest
        # As Lazuli and containerd do: plain HTTP is right for a registry on this machine.
        case $IMAGE in 127.* | localhost*) verify=false ;; esac
        # Kept under the digest, since a tag can move.
        digest=$(skopeo inspect --tls-verify=$verify --format '{{.Digest}}' "docker://$IMAGE" 2>>"$(build_log)") || unavailable
        REPOSITORY=user/$(printf '%s' "$IMAGE $digest" | sha256sum | cut -c 1-16)
        if ! has "$REPOSITORY:plain"; then
            say "copying $IMAGE into the throw-away registry (once)"
            skopeo copy --src-tls-verify=$verify --dest-tls-verify=false \
                "docker://$IMAGE" "docker://$REGISTRY/$REPOSITORY:plain" >>"$(build_log)" 2>&1 || unavailable
        fi
    else
        REPOSITORY=demo/python
        has $REPOSITORY:plain || build_python >>"$(build_log)" 2>&1
    fi
    FORMATS=(plain)
    if command -v ctr-remote >/dev/null; then
        has "$REPOSITORY:estargz" || convert "$REPOSITORY" >>"$(build_log)" 2>&1
        FORMATS+=(estargz)
    else
        say "ATTENTION: ctr-remote is not installed; the eStargz part is skipped"
    fi
    if [ "$MODE" = bench ]; then
        has "$REPOSITORY:chunked" || chunk "$REPOSITORY" >>"$(build_log)" 2>&1
        FORMATS+=(chunked)
    fi
}

# Prints the layers and the size of the image.
describe_image() {
    curl -fsS -H 'Accept: application/vnd.oci.image.manifest.v1+json' -H 'Accept: application/vnd.docker.distribution.manifest.v2+json' \
        "http://$REGISTRY/v2/$REPOSITORY/manifests/$1" |
        jq -r --arg tag "$1" '"  \($tag): \(.layers | length) layers, \([.layers[].size] | add / 1e6 | round) MB compressed"'
}
