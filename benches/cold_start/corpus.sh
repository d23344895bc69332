# The images of the cold-start matrix: what people run, made of Debian's packages (and PyPI's wheels), and three that are extreme on purpose. Each has
# a command, and a line of its output that says that it is ready; without one it is ready when it ends. Kept between runs, in a registry's
# storage directory. Sourced by matrix; images.sh comes before.
# shellcheck shell=bash

# Changes whenever a recipe below changes.
CORPUS_RECIPE=2
CORPUS=(python node redis nginx postgres java git science layers files fat)

declare -A COMMANDS=(
    [python]="python3 -c 'import numpy; print(\"sum\", int(numpy.arange(1000).sum()))'"
    [node]="node /app/server.js"
    [redis]="redis-server --port 0 --unixsocket /tmp/redis.sock --save ''"
    [nginx]="nginx -g 'daemon off; error_log /dev/stderr notice;'"
    [postgres]="setpriv --reuid=postgres --regid=postgres --clear-groups /app/postgres -D /app/data -c listen_addresses= -c unix_socket_directories=/tmp"
    [java]="java -cp /app Hello"
    [git]="sh -ec 'git init -q /tmp/r; cd /tmp/r; touch a; git add a; git -c user.name=a -c user.email=b commit -qm c; git log --oneline'"
    [science]="python3 -c 'import scipy.optimize, pandas, sklearn.linear_model, pyarrow; print(\"imported\")'"
    [layers]="sh -c 'cat /layers/*/first | wc -c'"
    [files]="sh -c 'ls /files/042 | wc -l; cat /files/0*/7 | wc -c'"
    [fat]="sh -c 'dd if=/fat bs=1M skip=700 count=1 2>/dev/null | wc -c'"
)
declare -A READY_LINES=(
    [node]=listening
    [redis]='ready to accept connections'
    [nginx]='start worker process [0-9]'
    [postgres]='database system is ready to accept connections'
)
# Something else that is started in the same image, until it ends.
declare -A OTHERS=(
    [python]="python3 -c 'import http.server, sqlite3, decimal, xml.dom.minidom; print(\"other\")'"
    [node]="node -e 'require(\"https\"); console.log(process.version)'"
    [redis]="redis-server --version"
    [nginx]="nginx -t"
    [postgres]="/app/postgres --describe-config"
    [java]="java -version"
    [git]="git --version"
    [science]="python3 -c 'import http.server, sqlite3, decimal, xml.dom.minidom; print(\"other\")'"
)

# Where images are made, and where the one that is being made has its files.
LAYOUT= BUNDLE= ROOTFS=

# begin NAME: a new image over the base.
begin() {
    BUNDLE=$WORK/build/$1
    ROOTFS=$BUNDLE/rootfs
    umoci tag --image "$LAYOUT:base" "$1"
    umoci unpack --image "$LAYOUT:$1" "$BUNDLE"
}

# packages LAYER PACKAGE...: a layer of packages.
packages() {
    local image
    image=$(basename "$BUNDLE")
    add_packages "$ROOTFS" "$@"
    pack_layer "$LAYOUT:$image" "$BUNDLE" "$*"
}

# written COMMENT: what was written into the tree becomes a layer.
written() { pack_layer "$LAYOUT:$(basename "$BUNDLE")" "$BUNDLE" "$1"; }

make_python() {
    packages python3
    packages python3-numpy
}

make_node() {
    packages nodejs
    packages node-express
    mkdir -p "$ROOTFS/app"
    cat >"$ROOTFS/app/server.js" <<'EOF'
const app = require("/usr/share/nodejs/express")();
app.get("/", (request, answer) => answer.send("hello"));
app.listen("/tmp/socket", () => console.log("listening"));
EOF
    written app
}

make_redis() { packages redis-server; }
make_nginx() { packages nginx; }
make_git() { packages git; }

make_postgres() {
    local bin
    packages postgresql
    bin=$(cd "$ROOTFS" && echo usr/lib/postgresql/*/bin)
    mkdir -p "$ROOTFS/app/data"
    ln -s "/$bin/postgres" "$ROOTFS/app/postgres"
    chroot "$ROOTFS" chown postgres:postgres /app/data
    chroot "$ROOTFS" setpriv --reuid=postgres --regid=postgres --clear-groups "/$bin/initdb" -D /app/data
    written data
}

make_java() {
    packages default-jre-headless
    mkdir -p "$ROOTFS/app"
    # class Hello { public static void main(String[] a) { System.out.println("hello"); } }, compiled for Java 8.
    base64 -d >"$ROOTFS/app/Hello.class" <<'EOF'
yv66vgAAADQAGgoAAgADBwAEDAAFAAYBABBqYXZhL2xhbmcvT2JqZWN0AQAGPGluaXQ+AQADKClWCQAIAAkHAAoMAAsADAEAEGphdmEvbGFuZy9TeXN0ZW0B
AANvdXQBABVMamF2YS9pby9QcmludFN0cmVhbTsIAA4BAAVoZWxsbwoAEAARBwASDAATABQBABNqYXZhL2lvL1ByaW50U3RyZWFtAQAHcHJpbnRsbgEAFShM
amF2YS9sYW5nL1N0cmluZzspVgcAFgEABUhlbGxvAQAEQ29kZQEABG1haW4BABYoW0xqYXZhL2xhbmcvU3RyaW5nOylWACAAFQACAAAAAAACAAAABQAGAAEA
FwAAABEAAQABAAAABSq3AAGxAAAAAAAJABgAGQABABcAAAAVAAIAAQAAAAmyAAcSDbYAD7EAAAAAAAA=
EOF
    written app
}

# Wheels come from where pip of this machine is told to get them, and over certificates that this machine believes. What a notebook has beside what the
# command imports makes it 600 MB and more, installed.
make_science() {
    local index=${PIP_INDEX_URL:-} authorities=/etc/ssl/certs/ca-certificates.crt
    packages python3 python3-pip
    index=${index:-$(pip3 config get global.index-url 2>/dev/null || true)}
    cp /etc/resolv.conf "$ROOTFS/etc/resolv.conf"
    cp "$authorities" "$ROOTFS/tmp/authorities"
    env -i PATH="$PATH" HOME=/root PIP_CERT=/tmp/authorities ${index:+PIP_INDEX_URL="$index"} \
        ${HTTPS_PROXY:+HTTPS_PROXY="$HTTPS_PROXY"} ${https_proxy:+https_proxy="$https_proxy"} \
        chroot "$ROOTFS" pip3 install --quiet --no-cache-dir --break-system-packages scipy pandas scikit-learn pyarrow matplotlib statsmodels numba
    rm -f "$ROOTFS/etc/resolv.conf" "$ROOTFS/tmp/authorities"
    say "  $(du -sm "$ROOTFS/usr/local/lib" | cut -f 1) MiB of wheels, installed"
    written "scipy pandas scikit-learn pyarrow matplotlib statsmodels numba"
}

make_layers() {
    local number
    for number in $(seq -w 1 99); do
        mkdir -p "$ROOTFS/layers/$number"
        head -c 20000 /dev/urandom >"$ROOTFS/layers/$number/first"
        head -c 200000 /dev/urandom >"$ROOTFS/layers/$number/second"
        written "layer $number"
    done
}

make_files() {
    local number
    for number in $(seq -w 0 99); do
        mkdir -p "$ROOTFS/files/$number"
        # A thousand files of 2000 bytes each.
        head -c 1500000 /dev/urandom | base64 -w 0 | head -c 2000000 | (cd "$ROOTFS/files/$number" && split -a 3 -d -b 2000 - '')
        (cd "$ROOTFS/files/$number" && mv 007 7)
    done
    written files
}

make_fat() {
    # Six bits in each byte: gzip -6 makes three quarters of it, while umoci's stores what it cannot compress at once, so that the plain blob has 2 GB.
    head -c 1500000000 /dev/urandom | base64 -w 0 | head -c 2000000000 >"$ROOTFS/fat"
    written fat
}

# wants FORMAT: whether the formats that were chosen (formats, an array; all if there is none) have it.
wants() { [[ " ${formats[*]:-plain estargz chunked} " = *" $1 "* ]]; }

# prepare_corpus IMAGE...: makes what is not there yet, and converts it into the formats that were chosen.
prepare_corpus() {
    local name suite mirror tag command
    LAYOUT=$WORK/build/oci
    for name in "$@"; do
        [ -n "${COMMANDS[$name]:-}" ] || die "there is no image called $name (${CORPUS[*]})"
        if ! has "corpus/$name:plain"; then
            say "making the image $name (once)"
            if [ ! -e "$LAYOUT" ]; then
                if has corpus/base:plain; then
                    mkdir -p "$WORK/build"
                    skopeo copy --src-tls-verify=false "docker://$REGISTRY/corpus/base:plain" "oci:$LAYOUT:base"
                else
                    make_base
                fi
            fi
            begin "$name"
            "make_$name"
            skopeo copy --dest-tls-verify=false "oci:$LAYOUT:$name" "docker://$REGISTRY/corpus/$name:plain"
            rm -rf --one-file-system "$BUNDLE"
        fi
        eval "command=(${COMMANDS[$name]})"
        # What is made of the plain one says it as well; those that were stored before do not.
        says_what_it_runs "corpus/$name" plain "${command[@]}"
        ! wants estargz || has "corpus/$name:estargz" || convert "corpus/$name"
        ! wants chunked || has "corpus/$name:chunked" || chunk "corpus/$name"
        ! wants soci || has "corpus/$name:soci" || index_soci "corpus/$name"
        ! wants estargz || [ "${EARLIER:-0}" = 0 ] || has "corpus/$name:estargz-earlier" || rebuild "corpus/$name"
        for tag in estargz chunked estargz-earlier; do
            ! has "corpus/$name:$tag" || says_what_it_runs "corpus/$name" "$tag" "${command[@]}"
        done
    done >>"$(build_log)" 2>&1
    rm -rf --one-file-system "$WORK/build"
}

make_base() {
    mkdir -p "$WORK/build"
    umoci init --layout "$LAYOUT"
    umoci new --image "$LAYOUT:base"
    umoci unpack --image "$LAYOUT:base" "$WORK/build/base"
    bootstrap "$WORK/build/base/rootfs"
    pack_layer "$LAYOUT:base" "$WORK/build/base" debootstrap
    umoci config --image "$LAYOUT:base" --config.env PATH=/usr/sbin:/usr/bin:/sbin:/bin
    skopeo copy --dest-tls-verify=false "oci:$LAYOUT:base" "docker://$REGISTRY/corpus/base:plain"
    rm -rf --one-file-system "$WORK/build/base"
}
