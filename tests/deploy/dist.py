#!/usr/bin/env python3
"""Takes the steps of the Dockerfile without Docker, and tries what they make.

The steps are read from the Dockerfile, so this cannot differ from it: the build
stage is carried out in target/dist, with only the files that .dockerignore
lets through, and what the last stage copies from it must start, say its version
and answer calls. The images themselves (their Rust, glibc and CA certificates)
are the part that only `docker build` can show.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Stays, so that the next run compiles only what has changed.
BUILD = ROOT / "target" / "dist"
GRPCURL = ROOT / ".tools" / "bin" / "grpcurl"
CALL = "groupstate.v1.GroupStateService"


def instructions(dockerfile):
    """The instructions as pairs: `COPY`, and what follows."""
    lines = (line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    joined = "\n".join(lines).replace("\\\n", "")
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def context():
    """What .dockerignore lets through, which ignores everything but what it names."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and all(rule.startswith("!") for rule in rules[1:]), rules
    return {rule[1:] for rule in rules[1:]}


def copy(sources, target):
    """COPY: a folder's content, or files by their time, as Docker does."""
    for source in sources:
        assert source in context(), f".dockerignore keeps {source} out"
        origin, goal = ROOT / source, BUILD / target
        if origin.is_dir():
            shutil.copytree(origin, goal, dirs_exist_ok=True)
        else:
            shutil.copy2(origin, goal / source if goal.is_dir() else goal)


def build(steps):
    """Carries out the build stage; returns the folder that it calls WORKDIR."""
    # Docker begins with an empty folder; what was compiled before may stay.
    for old in BUILD.glob("*"):
        if old.name != "target":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    BUILD.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CARGO_TARGET", "MAKE", "RUSTFLAGS"))}
    workdir = None
    for name, rest in steps:
        print(f"dist: {name} {rest}", flush=True)
        if name == "WORKDIR":
            workdir = rest
        elif name == "ENV":
            key, value = rest.split("=", 1)
            environment[key] = value
        elif name == "COPY":
            *sources, target = rest.split()
            copy(sources, target)
        elif name == "RUN":
            subprocess.run(["sh", "-ec", rest], cwd=BUILD, env=environment, check=True)
        elif name != "FROM":
            sys.exit(f"dist: no idea how to {name}")
    return workdir


def try_out(binary):
    """Starts it on free ports; it must say its version and answer calls."""
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    assert said == f"groupstate {version}\n", said

    ports = ["--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0"]
    service = subprocess.Popen([binary, *ports, "--log-format=json"], stderr=subprocess.PIPE, text=True, env={})
    try:
        for line in service.stderr:
            event = json.loads(line)
            if event.get("message") == "serving gRPC":
                break
        else:
            sys.exit("dist: it ended instead of serving")
        group = {"key": "dist", "metadata": {"state": "GROUP_STATE_FIRING"}}
        for rpc, request in [("Store", {"group": group}), ("Load", {"key": "dist"})]:
            subprocess.run(
                [GRPCURL, "-plaintext", "-max-time", "5", "-d", json.dumps(request), event["addr"], f"{CALL}/{rpc}"],
                check=True,
            )
        service.send_signal(2)
        assert service.wait(timeout=10) == 0
    finally:
        service.kill()


def main():
    steps = instructions((ROOT / "Dockerfile").read_text())
    last = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    workdir = build(steps[:last])
    copied = [rest for name, rest in steps[last:] if name == "COPY"]
    (origin,) = (re.fullmatch(r"--from=build (\S+) \S+", rest)[1] for rest in copied)
    binary = BUILD / pathlib.PurePosixPath(origin).relative_to(workdir)
    try_out(binary)
    print(f"dist: {binary.relative_to(ROOT)}, {binary.stat().st_size / 2**20:.1f} MiB, works")


if __name__ == "__main__":
    main()
