# The images of the benchmark of the faces, in the storage directory of the registry that the cold start keeps too. Sourced by run.
# shellcheck shell=bash

# Changes whenever a recipe below changes, so that kept images are built anew.
FACES_RECIPE=1

# What the tree has to have at least, so that the figures mean something.
LEAST_ENTRIES=12000
LEAST_BYTES=400000000

TREE=faces/tree:$FACES_RECIPE       # the cold start's image as one layer
TEN=faces/ten:$FACES_RECIPE         # the same files in ten layers, each with all the directories
BIG=faces/big:$FACES_RECIPE         # one layer with one file of 1 GiB
# The first layers of the ten, and one of their own.
BRANCHES=("faces/branch-3:$FACES_RECIPE" "faces/branch-6:$FACES_RECIPE")
LAYERS=(1 10 100)
# As many layers of a thousand files each.
SMALL=("faces/one:$FACES_RECIPE" "faces/small-ten:$FACES_RECIPE" "faces/hundred:$FACES_RECIPE")

# layers_of COUNT: the one of SMALL with so many layers.
layers_of() {
    local at
    for at in "${!LAYERS[@]}"; do
        [ "${LAYERS[at]}" != "$1" ] || echo "${SMALL[at]}"
    done
}

# write_image NAME:TAG TAR...: an image of these layers, the lowest first, goes to the registry. The tar files are used up.
#
# Layers stay plain tar: how fast somebody decompresses is measured elsewhere.
write_image() {
    local name=$1 layout=$WORK/layout file digest size
    shift
    rm -rf "$layout"
    mkdir -p "$layout/blobs/sha256"
    echo '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
    for file in "$@"; do
        digest=$(sha256sum "$file" | cut -d ' ' -f 1)
        size=$(stat -c %s "$file")
        mv "$file" "$layout/blobs/sha256/$digest"
        echo "$digest $size"
    done >"$layout/layers"
    jq -Rcn --arg arch "$(go_arch)" '{
        architecture: $arch, os: "linux", config: {},
        rootfs: {type: "layers", diff_ids: [inputs | "sha256:" + split(" ")[0]]}}' "$layout/layers" |
        add_document "$layout" application/vnd.oci.image.config.v1+json >"$layout/config"
    jq -Rcn --slurpfile config "$layout/config" '{
        schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json", config: $config[0],
        layers: [inputs | split(" ") | {mediaType: "application/vnd.oci.image.layer.v1.tar", digest: ("sha256:" + .[0]), size: (.[1] | tonumber)}]
        }' "$layout/layers" |
        add_document "$layout" application/vnd.oci.image.manifest.v1+json >"$layout/manifest"
    jq -c '{schemaVersion: 2, manifests: [.]}' "$layout/manifest" >"$layout/index.json"
    # With its digests: the layers are not compressed on the way.
    skopeo copy --quiet --preserve-digests --dest-tls-verify=false "oci:$layout" "docker://$REGISTRY/$name"
    rm -rf "$layout"
}

# add_document LAYOUT TYPE: stdin becomes a blob; prints its descriptor.
add_document() {
    local file=$1/document digest
    cat >"$file"
    digest=$(sha256sum "$file" | cut -d ' ' -f 1)
    jq -cn --arg type "$2" --arg digest "sha256:$digest" --argjson size "$(stat -c %s "$file")" '{mediaType: $type, $digest, $size}'
    mv "$file" "$1/blobs/sha256/$digest"
}

# count DIR: sets ENTRIES and BYTES.
count() {
    ENTRIES=$(find "$1" | wc -l)
    BYTES=$(du -s -B 1 --apparent-size "$1" | cut -f 1)
}

# unpack_python DIR: the files of the cold start's image.
unpack_python() {
    local copy=0
    skopeo copy --quiet --src-tls-verify=false "docker://$REGISTRY/demo/python:plain" "oci:$WORK/python:python"
    umoci unpack --image "$WORK/python:python" "$WORK/bundle"
    mv "$WORK/bundle/rootfs" "$1"
    rm -rf "$WORK/python" "$WORK/bundle"
    count "$1"
    # A distribution whose packages are smaller: its libraries once more, elsewhere.
    while [ "$ENTRIES" -lt $LEAST_ENTRIES ] || [ "$BYTES" -lt $LEAST_BYTES ]; do
        copy=$((copy + 1))
        [ $copy -le 4 ] || die "the cold start's image is too small: $ENTRIES names, $BYTES bytes with copies"
        mkdir -p "$1/opt/copy-$copy"
        cp -a "$1/usr/lib" "$1/opt/copy-$copy/lib"
        count "$1"
    done
    say "  $ENTRIES names, $((BYTES / 1000000)) MB"
}

# pack DIR TAR [OPTION...]: a tar of all in DIR, or of what the options say.
pack() {
    local dir=$1 file=$2
    shift 2
    [ $# != 0 ] || set -- --sort=name .
    tar -C "$dir" --numeric-owner --xattrs --xattrs-include='*' -cf "$file" "$@"
}

build_tree_and_ten() {
    local tree=$WORK/tree layer files=()
    unpack_python "$tree"
    pack "$tree" "$WORK/tree.tar"
    write_image $TREE "$WORK/tree.tar"
    # Names in the order of the tree, dealt out like cards.
    find "$tree" -mindepth 1 -type d -printf '%P\n' | sort >"$WORK/dirs"
    find "$tree" ! -type d -printf '%P\n' | sort >"$WORK/files"
    for layer in {0..9}; do
        awk -v layer="$layer" 'NR % 10 == layer' "$WORK/files" | cat "$WORK/dirs" - >"$WORK/list"
        pack "$tree" "$WORK/ten-$layer.tar" --no-recursion --verbatim-files-from -T "$WORK/list"
        files+=("$WORK/ten-$layer.tar")
    done
    write_image $TEN "${files[@]}"
    rm -rf --one-file-system "$tree" "$WORK/dirs" "$WORK/files" "$WORK/list"
}

# build_small COUNT: layers of a thousand files.
build_small() {
    local dir=$WORK/thousand number files=()
    mkdir -p "$dir"
    # Empty: nobody reads them, and to remove a file with content takes a millisecond where the disk is told of each free block.
    for number in {000..999}; do
        : >"$dir/file-$number"
    done
    for ((number = 0; number < $1; number++)); do
        # The images have no layer in common.
        tar -C "$dir" --sort=name --transform "s,^\.,usr/share/part-$1-$number," -cf "$WORK/small-$number.tar" .
        files+=("$WORK/small-$number.tar")
    done
    write_image "$(layers_of "$1")" "${files[@]}"
    rm -rf "$dir"
}

# build_branch IMAGE COUNT: so many of the ten layers, and one of its own.
build_branch() {
    local base=http://$REGISTRY/v2/${TEN%:*} digest files=()
    for digest in $(curl -fsS -H 'Accept: application/vnd.oci.image.manifest.v1+json' "$base/manifests/${TEN##*:}" |
        jq -r --argjson count "$2" '.layers[:$count][].digest'); do
        files+=("$WORK/branch-${#files[@]}.tar")
        curl -fsS -o "${files[-1]}" "$base/blobs/$digest"
    done
    mkdir -p "$WORK/branch"
    head -c 2M /dev/urandom >"$WORK/branch/branch-$2.bin"
    pack "$WORK/branch" "$WORK/branch-own.tar"
    write_image "$1" "${files[@]}" "$WORK/branch-own.tar"
    rm -rf "$WORK/branch"
}

build_big() {
    mkdir -p "$WORK/big"
    # Bytes that no file system can store as a hole.
    head -c 1G /dev/urandom >"$WORK/big/big.bin"
    pack "$WORK/big" "$WORK/big.tar"
    rm -rf "$WORK/big"
    write_image $BIG "$WORK/big.tar"
}

# prepare_faces_images: makes what the registry does not have yet.
prepare_faces_images() {
    has demo/python:plain || build_python
    if ! has $TREE || ! has $TEN; then
        say "building the images with the file tree (once)"
        build_tree_and_ten
    fi
    local image layers
    for image in "${BRANCHES[@]}"; do
        layers=${image#*-}
        has "$image" || build_branch "$image" "${layers%:*}"
    done
    for layers in "${LAYERS[@]}"; do
        if ! has "$(layers_of "$layers")"; then
            say "building an image of $layers layers (once)"
            build_small "$layers"
        fi
    done
    if ! has $BIG; then
        say "building the image with a file of 1 GiB (once)"
        build_big
    fi
}

# chain_id NAME:TAG: the chain id of all its layers.
chain_id() {
    local base=http://$REGISTRY/v2/${1%:*} config id chain=
    config=$(curl -fsS -H 'Accept: application/vnd.oci.image.manifest.v1+json' "$base/manifests/${1##*:}" | jq -r .config.digest)
    for id in $(curl -fsS "$base/blobs/$config" | jq -r '.rootfs.diff_ids[]'); do
        if [ -z "$chain" ]; then
            chain=$id
        else
            chain=sha256:$(printf '%s %s' "$chain" "$id" | sha256sum | cut -d ' ' -f 1)
        fi
    done
    echo "$chain"
}
