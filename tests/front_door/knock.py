"""Makes one call of groupstate and prints what a Python client sees of it.

    python tests/front_door/knock.py HOST:PORT OPTIONS

OPTIONS is a JSON object: "ca" (a file; its absence means plain text), "cert"
and "key" (files), "token", "call" ("Size", the default, or "Health"). With
"token-file", it goes on calling until its standard input ends, reads the token
before each call, and prints how many calls succeeded, or what the first failure was.
"""

import json
import select
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# Seconds.
SOON = 10


def read(path):
    with open(path, "rb") as file:
        return file.read()


def main(address, options):
    if "ca" in options:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=read(options["ca"]),
            private_key=read(options["key"]) if "key" in options else None,
            certificate_chain=read(options["cert"]) if "cert" in options else None,
        )
        channel = grpc.secure_channel(address, credentials)
    else:
        channel = grpc.insecure_channel(address)
    # An empty request is an empty message.
    size = channel.unary_unary("/groupstate.v1.GroupStateService/Size")

    def call(token):
        metadata = [("authorization", "Bearer " + token)] if token else []
        if options.get("call") == "Health":
            stub = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=SOON, metadata=metadata)
        else:
            size(b"", timeout=SOON, metadata=metadata)

    try:
        if "token-file" not in options:
            call(options.get("token"))
            print("OK")
            return
        calls = 0
        while not select.select([sys.stdin], [], [], 0)[0]:
            call(read(options["token-file"]).decode())
            calls += 1
        print(calls)
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}")


main(sys.argv[1], json.loads(sys.argv[2]))
