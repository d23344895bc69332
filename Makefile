# Every task first installs what it needs and is missing (deploy/setup; Debian and Ubuntu, root or sudo).
# `make` alone explains what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

SETUP := deploy/setup
CARGO := deploy/cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)

# End-to-end tests mount file systems. Cargo itself stays with the user who called make; only the tests it built get root.
ifneq ($(shell id -u),0)
HOST := $(shell uname -m | tr a-z A-Z)
export CARGO_TARGET_$(HOST)_UNKNOWN_LINUX_GNU_RUNNER := sudo --preserve-env
endif

.PHONY: help demo test test-slow test-faults test-interleaved test-takeover test-soak test-posix test-cri test-quotas suite bench bench-coldstart bench-crowd fmt lint deny fuzz advisories build sbom install clean-demo

## build       the release binary
build:
	@$(SETUP) build
	$(CARGO) build --release --locked --bin lazuli

## demo        a container from a real registry over a slow link, with overlayfs and with Lazuli
##             (IMAGE=registry/name:tag CMD='...' for an image of your choice; RTT=20 ms, MBIT=100)
demo:
	@$(SETUP) build demo
	$(CARGO) build --release --locked --bin lazuli --example link
	@CARGO_TARGET_DIR='$(TARGET)' benches/cold_start/run demo

## test        unit, property and end-to-end tests; the important ones of the latter once more with the tree face
test:
	@$(SETUP) build test
	@LAZULI_CONTAINERD2='$(abspath $(TARGET))/containerd2'; \
	if [ ! -x tests/support/get-containerd2 ]; then \
	    :; \
	elif tests/support/get-containerd2 "$$LAZULI_CONTAINERD2"; then \
	    export LAZULI_CONTAINERD2; \
	else \
	    echo 'test: ATTENTION: containerd 2.x cannot be had here; its end-to-end tests are skipped' >&2; \
	fi; \
	$(CARGO) test --locked; \
	$(CARGO) test --locked --lib --features shuttle interleaved; \
	LAZULI_E2E_FACE=tree $(CARGO) test --locked --test e2e -- trees:: restart:: pull::containers variants:: commands::mount node:: takeover:: \
	    --skip many_entries --skip huge_file

## test-slow   the tests that take minutes: the large torture layers
test-slow:
	@$(SETUP) build test
	$(CARGO) test --locked -- --ignored --skip takeover:: --skip soak:: --skip posix:: --skip cri::

## test-faults  the seeded simulation and power cuts, for LAZULI_FAULT_MINUTES=10 each, with random seeds (LAZULI_SEED=n repeats one)
test-faults: export LAZULI_FAULT_MINUTES ?= 10
test-faults:
	@$(SETUP) build test
	$(CARGO) test --locked --lib -- --nocapture a_node_in_any_weather what_was_answered_survives_a_power_cut
	$(CARGO) test --locked --test disk -- --nocapture a_power_cut_loses_nothing

## test-interleaved  single flight, ready map and queue in many orders of their threads (LAZULI_ORDERS=5000 of each test; LAZULI_SEED=n repeats one)
test-interleaved: export LAZULI_ORDERS ?= 5000
test-interleaved:
	@$(SETUP) build
	$(CARGO) test --locked --lib --features shuttle -- --nocapture --test-threads 2 interleaved

## test-takeover  many kills, upgrades and restarts under reading containers (LAZULI_TAKEOVERS=200, LAZULI_SEED=n repeats one)
test-takeover:
	@$(SETUP) build test
	$(CARGO) test --locked --test e2e -- --ignored --nocapture --test-threads 1 takeover::
	LAZULI_E2E_FACE=tree $(CARGO) test --locked --test e2e -- --ignored --nocapture --test-threads 1 takeover::

## test-soak   everything at once with faults of every kind, every byte compared (LAZULI_SOAK_MINUTES=30, over all containerds; LAZULI_SEED=n)
test-soak:
	@$(SETUP) build test
	@LAZULI_CONTAINERD2='$(abspath $(TARGET))/containerd2'; \
	if tests/support/get-containerd2 "$$LAZULI_CONTAINERD2"; then export LAZULI_CONTAINERD2; fi; \
	$(CARGO) test --locked --test e2e -- --ignored --nocapture --test-threads 1 soak::

## test-posix  pjdfstest and fsx in containers, on overlayfs and on Lazuli with both faces: equal results (builds them from crates.io)
POSIX := $(abspath $(TARGET))/posix
test-posix:
	@$(SETUP) build test
	RUSTFLAGS='-C target-feature=+crt-static' cargo install --locked --root '$(POSIX)' --target '$(shell uname -m)-unknown-linux-gnu' \
	    pjdfstest@0.2.2 fsx@0.3.2
	LAZULI_POSIX='$(POSIX)' $(CARGO) test --locked --test e2e -- --ignored --nocapture posix::
	LAZULI_POSIX='$(POSIX)' LAZULI_E2E_FACE=tree $(CARGO) test --locked --test e2e -- --ignored --nocapture posix::

## test-cri    pods, through containerd's CRI plugin: user namespaces, passwords of kubelet, sandboxes without a registry (builds crictl and runc; needs Go)
CRI := $(abspath $(TARGET))/cri
test-cri:
	@$(SETUP) build test cri
	@tests/support/get-cri '$(CRI)'
	@LAZULI_CONTAINERD2='$(abspath $(TARGET))/containerd2'; \
	tests/support/get-containerd2 "$$LAZULI_CONTAINERD2"; \
	export LAZULI_CONTAINERD2 LAZULI_CRI='$(CRI)'; \
	$(CARGO) test --locked --test e2e -- --ignored --nocapture --test-threads 1 cri::; \
	LAZULI_E2E_FACE=tree $(CARGO) test --locked --test e2e -- --ignored --nocapture --test-threads 1 cri::a_pod

## test-quotas  limits of size on ext4 and xfs, under Debian's kernel in a virtual machine, whatever the kernel here was built without (x86-64)
test-quotas:
	@$(SETUP) build test quotas
	$(CARGO) test --locked --test snapshots --no-run
	@binary=$$($(CARGO) test --locked --test snapshots --no-run 2>&1 | sed -n 's/.*(\(.*\/snapshots-[0-9a-f]*\)).*/\1/p'); \
	tests/support/other-kernel '$(abspath $(TARGET))/other-kernel' env \
	    LAZULI_REQUIRE=ext4-project-quotas,xfs-project-quotas timeout 600 "$$binary" limits --test-threads 1

## suite       containerd's own snapshotter suite against the daemon
suite:
	@$(SETUP) build test suite
	CARGO_TARGET_DIR='$(TARGET)' tests/suite/run

## bench       micro-benchmarks, then the faces of layers, a dense node (page cache, scale, memory) and the cold start: medians and ratios
##             against overlayfs (RUNS=5 rounds, CREATES=20 containers of 1, 10 and 100 layers; CHECK=1 fails if a target is missed)
bench:
	@$(SETUP) build demo
	$(CARGO) bench --locked
	$(CARGO) build --release --locked --bin lazuli --examples
	@CARGO_TARGET_DIR='$(TARGET)' benches/faces/run
	@CARGO_TARGET_DIR='$(TARGET)' benches/dense/run
	@CARGO_TARGET_DIR='$(TARGET)' benches/dense/scale
	@CARGO_TARGET_DIR='$(TARGET)' benches/dense/memory
	@CARGO_TARGET_DIR='$(TARGET)' benches/applied/run
	@CARGO_TARGET_DIR='$(TARGET)' benches/cold_start/run bench

## bench-coldstart  cold starts of eleven images over four links, with every snapshotter at hand; a table, target/coldstart.json and .svg
##             (IMAGES="python node", PROFILES="lan region far store", FORMATS="plain estargz chunked soci indexed", RUNS=3, FULL=0, LEARNED=0, EARLIER=0).
##             The first run makes the images, and builds containerd 2.3 (needs Go); all of it takes hours
bench-coldstart:
	@$(SETUP) build demo reference
	$(CARGO) build --release --locked --bin lazuli --example link
	@CARGO_TARGET_DIR='$(TARGET)' benches/cold_start/matrix

## bench-crowd  on an empty node: fifty containers of one image at once, twenty images at once; and a restart over a million files
##             (PARTS="same different restart", COUNT=50, RUNS=3; CHECK=1 fails if a target is missed). The first run makes the images
bench-crowd:
	@$(SETUP) build test demo reference
	$(CARGO) build --release --locked --bin lazuli --example link
	@CARGO_TARGET_DIR='$(TARGET)' benches/cold_start/crowd

## fmt         formats the code
fmt:
	@$(SETUP) build lint
	$(CARGO) fmt

## lint        checks the format, and runs clippy with warnings as errors
lint:
	@$(SETUP) build lint
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

## deny        licences, sources and versions of the dependencies
deny:
	@$(SETUP) build deny
	$(CARGO) deny --locked check --hide-inclusion-graph licenses bans sources

## fuzz        every parser with random bytes, FUZZ_SECONDS=60 each (FUZZ="tar merge": these alone); what it learns stays in target/fuzz.
##             `make test` tries the seeds and variations of them
FUZZ_SECONDS ?= 60
# MiB that a target may have in memory, and of addresses. (Decoders have windows of 128 MiB; libFuzzer and the program take some hundred.)
FUZZ_RSS := 1024
FUZZ_ADDRESSES := 2560
FUZZ_DIR := $(abspath $(TARGET))/fuzz
FUZZ_HOST := $(shell uname -m)-unknown-linux-gnu
# What libFuzzer learns from: LLVM's counters of edges and operands of comparisons, which the stable compiler has as well. The code is safe Rust, so that
# no sanitizer is needed; checks of overflows and assertions are on.
FUZZ_FLAGS := --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
fuzz:
	@$(SETUP) build fuzz
	CARGO_TARGET_DIR='$(FUZZ_DIR)' RUSTFLAGS='$(FUZZ_FLAGS)' $(CARGO) build --locked --manifest-path fuzz/Cargo.toml --target $(FUZZ_HOST)
	ulimit -v $$(($(FUZZ_ADDRESSES) * 1024)); \
	for target in $(or $(FUZZ),$(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))); do \
	    mkdir -p "$(FUZZ_DIR)/corpus/$$target" "$(FUZZ_DIR)/found"; \
	    "$(FUZZ_DIR)/$(FUZZ_HOST)/debug/$$target" "$(FUZZ_DIR)/corpus/$$target" "fuzz/corpus/$$target" \
	        -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -timeout=20 -rss_limit_mb=$(FUZZ_RSS) -print_final_stats=1 \
	        -artifact_prefix="$(FUZZ_DIR)/found/$$target-" || exit; \
	done

## advisories  known vulnerabilities of the dependencies (fetches the advisory database)
advisories:
	@$(SETUP) build deny
	$(CARGO) deny check advisories

## sbom        the release binary with the list of all crates in it, which scanners read (builds cargo-auditable; no network but for that)
sbom:
	@$(SETUP) build audit
	$(CARGO) auditable build --release --locked --bin lazuli

## install     the release binary, the systemd unit and a containerd drop-in, on this machine
install: build
	LAZULI_BINARY='$(TARGET)/release/lazuli' deploy/install

## clean-demo  removes the images that the demo and the benchmarks keep
clean-demo:
	rm -rf '$(TARGET)/demo-images' '$(TARGET)/corpus-images'

## help        this text
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)
