# What one does with this repository, in the order in which a newcomer needs it.
# `run` needs Rust, gcc and make; the rest needs what `tools` installs.

.DEFAULT_GOAL := help
.PHONY: run test chaos afterwards replicas matrix failover-times bench bench-check abuse fuzz random-client deny advisories sbom pin-images coverage lint dist tools proto-image prometheus-rule clean-tools next-step help
.NOTPARALLEL:

PROTO_IMAGE := proto/groupstate.v1.binpb
PROMETHEUS_RULE := deploy/kubernetes/monitoring/prometheus-rule.yaml
BUF := .tools/bin/buf
SEEDS ?= 1..20
FUZZ_SECONDS ?= 60
SECONDS ?= 60

run: ## Build and start the service, by default with groups in memory; ARGS='--redis-url …' adds settings
	cargo build --release --locked
	@$(MAKE) --no-print-directory next-step
	@exec cargo run --release --locked --quiet --bin groupstate -- $(ARGS)

# Twice as many tests at once as there are processors: most of their time they wait.
test: export RUST_TEST_THREADS ?= $(shell expr 2 \* $$(nproc))
test: tools ## Install what the tests need, then run them all
	cargo test --locked --no-fail-fast

chaos: tools ## Try many fault schedules; SEEDS=1..100 (or a count), POLICY=discard or reconcile, JOBS=2 side by side, REDIS=sentinel or cluster
	CHAOS_SEEDS='$(SEEDS)' CHAOS_POLICY='$(POLICY)' CHAOS_JOBS='$(JOBS)' CHAOS_REDIS='$(REDIS)' \
		cargo test --locked --test chaos many_seeds -- --ignored --nocapture

afterwards: tools ## Measure every rpc before and after each failure there is, and print tables
	cargo test --locked --test afterwards table -- --ignored --nocapture

replicas: tools ## Kill replicas, instances and Redis at random, let alerts come and go, and print tables; REPLICA_SEEDS=3 runs of each size
	cargo build --locked --example alert_history_replica
	REPLICA_SEEDS='$(REPLICA_SEEDS)' \
		cargo test --locked --test replicas -- --ignored --nocapture table ten_times_over a_hundred_thousand

matrix: tools ## Run the contract suite and some chaos on every Redis that is supported, and print a table
	tests/tools/install-redis.sh
	tests/tools/matrix.sh

failover-times: tools ## Measure how soon a replica that has taken over is used, by Sentinel and in a cluster
	cargo bench --locked --bench failover_times

bench: tools ## Measure what calls cost beside a thin pass-through, and write it to benches/results/
	tests/tools/install-bench.sh
	cargo bench --locked --bench wire

bench-check: tools ## Count the instructions of the pieces of a call, and compare them with benches/instructions.txt; RENEW=1 renews it
	tests/tools/install-bench.sh
	RENEW='$(RENEW)' cargo bench --locked --bench instructions

abuse: ## Misbehave as clients in every way at full size, and print what it costs; ABUSE=Idle does one
	cargo test --release --locked --test front_door at_full_size -- --ignored --nocapture
	cargo test --release --locked --test failover large::a_thousand -- --ignored --nocapture

fuzz: ## Try made-up inputs on everything that reads bytes from outside, FUZZ_SECONDS=60 each; needs a nightly compiler
	fuzz/run $(FUZZ_SECONDS)

random-client: tools ## Send anything to the service for SECONDS=60, in memory and on Redis, and print what comes back; SEED=1
	RANDOM_CLIENT_SECONDS='$(SECONDS)' RANDOM_CLIENT_SEED='$(or $(SEED),1)' \
		cargo test --locked --test front_door random::for_a_long_time -- --ignored --nocapture

# Not a part of `lint`: to build cargo-deny takes minutes.
deny: .tools/bin/cargo-deny ## Check the licences of what we depend on, where it comes from, and what is there twice
	$< --locked check licenses bans sources

# The database is a repository on GitHub. Where it cannot be reached, that is said and is
# no error, unless ADVISORIES=required.
ADVISORY_DATABASE = $(shell sed -n 's/^db-urls = \["\(.*\)"\]$$/\1/p' deny.toml)
advisories: .tools/bin/cargo-deny ## Look for security advisories about what we depend on; ADVISORIES=required fails where their database cannot be had
	@if timeout 30 git ls-remote --exit-code $(ADVISORY_DATABASE) HEAD >/dev/null; then \
		$< --locked check advisories; \
	else \
		echo 'advisories: NOT CHECKED, $(ADVISORY_DATABASE) cannot be reached' >&2; \
		test '$(ADVISORIES)' != required; \
	fi

# Of what is in the program, and not of what builds and tests it.
sbom: .tools/bin/cargo-cyclonedx ## Write what the program is made of to target/groupstate.cdx.json, in CycloneDX
	PATH="$(CURDIR)/.tools/bin:$$PATH" cargo cyclonedx --format json --spec-version 1.5 --no-build-deps \
		--target x86_64-unknown-linux-gnu --override-filename groupstate.cdx
	mv groupstate.cdx.json target/

.tools/bin/cargo-cyclonedx:
	cargo install cargo-cyclonedx --locked --version 0.5.9 --root .tools

pin-images: ## Write the digest of each image behind its tag, as the registries have it; needs docker
	deploy/pin-images

.tools/bin/cargo-deny:
	cargo install cargo-deny --locked --version 0.20.2 --root .tools

lint: tools ## Check formatting, clippy, and that the proto is well-formed and compatible
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --all-targets -- -D warnings
	$(BUF) lint proto
	$(BUF) breaking proto --against $(PROTO_IMAGE)

# Processes that the tests kill write what they have run while they run, for which
# the counters have to lie in the file: the flag. (%c, in tests/common/mod.rs.)
# They start the examples, too, which tarpaulin does not build.
coverage: TARPAULIN := RUSTFLAGS='-C llvm-args=-runtime-counter-relocation' .tools/bin/cargo-tarpaulin tarpaulin --engine llvm
coverage: tools .tools/bin/cargo-tarpaulin ## Measure which lines of src/ the tests run; at first it builds cargo-tarpaulin
	eval "$$($(TARPAULIN) --stderr --print-rust-flags)" && export RUSTFLAGS && \
		cargo build --locked --examples --target-dir target/coverage
	$(TARPAULIN) --locked --target-dir target/coverage --objects target/coverage/debug/groupstate \
		--include-files 'src/*' --skip-clean --timeout 900 --out Stdout --out Html --output-dir target/coverage

.tools/bin/cargo-tarpaulin:
	cargo install cargo-tarpaulin --locked --version 0.37.5 --root .tools

dist: tools ## Take the steps of the Dockerfile without Docker, and try what they make
	tests/deploy/dist.py

tools: ## Install the programs of the tests: Redis, Prometheus and kubectl by apt, the others into .tools/
	tests/tools/install.sh

# The image is what clients were promised, so `lint` must have passed against the
# old one: additions only. It is renewed with each release, and may be with an
# addition, which is protected from then on. Never to get past a failed `lint`.
proto-image: tools ## Renew the descriptor image that `lint` compares the proto with
	$(BUF) breaking proto --against $(PROTO_IMAGE)
	$(BUF) build proto --exclude-source-info -o $(PROTO_IMAGE)

prometheus-rule: ## Renew the copy of deploy/prometheus/rules.yaml that Kubernetes gets
	sed -i '/^spec:$$/q' $(PROMETHEUS_RULE)
	sed -n '/^groups:/,$$p' deploy/prometheus/rules.yaml | sed 's/./  &/' >>$(PROMETHEUS_RULE)

clean-tools: ## Remove what `tools` has put into .tools/
	rm -rf .tools

# The lines come from the README, whose tests run them word for word.
next-step: ## Print what to try once the service runs
	@printf '\nThe service starts now. Try it from another terminal:\n\n'
	@command -v grpcurl >/dev/null || \
		printf '# once, to get grpcurl\nmake -C "%s" tools && export PATH="%s/.tools/bin:$$PATH"\n\n' '$(CURDIR)' '$(CURDIR)'
	@sed -n '/^<!-- next step -->/,/^<!-- end -->/{ /^```sh/,/^```$$/{ /^```/!p; }; }' README.md
	@printf '\n'

help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1 \2/p' $(MAKEFILE_LIST) | \
		while read -r target text; do printf '%-16s %s\n' "$$target" "$$text"; done
