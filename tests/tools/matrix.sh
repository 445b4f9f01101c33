#!/usr/bin/env bash
# Runs the contract suite and some chaos on every Redis that install-redis.sh gets,
# and prints a table. Writes nothing but into a temporary folder.
#   SEEDS=1..8        seeds of the chaos runs on one server
#   FAILOVERS=1..3    the same where a replica takes over
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seeds=${SEEDS:-1..8}
failovers=${FAILOVERS:-1..3}
logs=$(mktemp -d)
trap 'rm -r "$logs"' EXIT
failed=0

# One test binary: what it says at the end, or a failure.
contract() {
    if cargo test --locked --test contract -- "$@" >"$logs/contract" 2>&1; then
        sed -n 's/^test result: ok. \([0-9]*\) passed.*/\1 passed/p' "$logs/contract"
    else
        failed=1
        grep -A4 'panicked at\|^error' "$logs/contract" >&2
        sed -n 's/^test result: FAILED. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$logs/contract"
    fi
}

chaos() {
    if CHAOS_SEEDS=$1 CHAOS_REDIS=$2 cargo test --locked --test chaos many_seeds -- --ignored --nocapture \
        >"$logs/chaos" 2>&1; then
        sed -n 's/^\([0-9]* runs, 0 failed; [0-9]* calls\),.* \([0-9]* lost\),.*/\1, \2/p' "$logs/chaos"
    else
        failed=1
        grep -v '^ *[0-9]*: \|^ *at ' "$logs/chaos" >&2
        grep '^[0-9]* runs, ' "$logs/chaos" || echo failed
    fi
}

# NAME OF THE PROGRAM, DEPLOYMENT, SEEDS, CHAOS_REDIS, then which tests of the contract.
row() {
    local name=$1 deployment=$2 seeds=$3 replicated=$4 program=$PWD/.tools/redis/$1/redis-server
    shift 4
    if [[ ! -x $program ]]; then
        echo "| $name | $deployment | not to be had here | |"
        return
    fi
    local version
    version=$("$program" --version | sed -n 's/^\([A-Za-z]*\) server v=\([^ ]*\).*/\1 \2/p')
    export GROUPSTATE_TEST_REDIS=$program
    echo "| $version | $deployment | $(contract "$@") | $(chaos "$seeds" "$replicated") |"
}

cargo test --locked --no-run --test contract --test chaos >"$logs/build" 2>&1 || { cat "$logs/build" >&2; exit 1; }
echo '| Redis | deployment | contract suite | chaos |'
echo '|---|---|---|---|'
one=(--skip memory_store --skip cluster_store --skip sentinel_store)
for name in 6.0 6.2 7.0 valkey; do
    row "$name" standalone "$seeds" '' "${one[@]}"
done
row 7.0 'Sentinel: 3 sentinels, 1 primary, 2 replicas' "$failovers" sentinel sentinel_store
row 7.0 'Cluster: 3 primaries, 3 replicas' "$failovers" cluster cluster_store
exit $failed
