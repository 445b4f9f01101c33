"""A client of groupstate.

    from groupstate import Client, pb

    with Client(["groupstate.alert-history.svc:50051"]) as client:
        client.change("alertname=HighCPU,cluster=prod", lambda group: ...)

`client` says what it does about races, errors and outages; `pb` has the messages.
"""

from groupstate.client import (
    Client,
    Failure,
    NotFound,
    OutcomeUnknown,
    Unreachable,
    rank,
)
from groupstate.v1 import group_state_pb2 as pb
from groupstate.v1 import group_state_pb2_grpc as services

__all__ = [
    "Client",
    "Failure",
    "NotFound",
    "OutcomeUnknown",
    "Unreachable",
    "pb",
    "rank",
    "services",
]
