"""The client.

Top to bottom: the numbers, what can go wrong, which instance a key belongs to, one
instance, and the client itself.

What to know when you use it, or write one of your own:

- A group that others change too is changed by `Client.change` alone: a loop of
  CompareAndSwap that applies the change *again* to what is stored by then.
- One key is served by one instance, chosen by the key. While Redis is down each
  instance answers from its own memory; a client that goes from one to the other
  would compare the versions of one memory with those of another, without end.
- Every call has a deadline, every error a reason, and what may or may not have
  been written is said to be so.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Optional, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from groupstate.v1 import group_state_pb2 as pb
from groupstate.v1 import group_state_pb2_grpc as services

T = TypeVar("T")

# === The numbers ===

# Seconds that a call on one group gets. The service answers within 1 s, from
# memory if need be; with less, a call may end in the half second in which a hung
# Redis has not been given up yet.
CALL_TIMEOUT = 2.0

# Seconds that a listing gets: it reads every key there is.
LISTING_TIMEOUT = 60.0

# Seconds after which an instance that cannot be reached is passed over.
CONNECT_TIMEOUT = 0.5

# Seconds after which names are resolved again, so that new instances are used.
RESOLVE_EVERY = 10.0

# Seconds for which a change or a read is begun anew, before its last error is
# raised: longer than it takes to notice that an instance hangs (see keepalive).
PATIENCE = 15.0

# Seconds to wait before a second attempt, doubled for each further one.
FIRST_BACKOFF, LONGEST_BACKOFF = 0.01, 0.5

CHANNEL_OPTIONS = [
    # Each channel has one address. The choice of the instance is ours.
    ("grpc.service_config", '{"loadBalancingConfig": [{"pick_first": {}}]}'),
    # No retryPolicy, neither ours nor one from DNS: the repetition of a swap that
    # succeeded looks like a lost race.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    # An instance that is gone without a word is noticed within 13 s, idle or not.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The default of two minutes would keep an instance unused long after its return.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

# === What can go wrong ===


class Failure(Exception):
    """The service refuses a call, and surely has not done what it asked for."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: Optional[str],
        message: Optional[str],
        metadata: Optional[dict[str, str]] = None,
        fields: Optional[dict[str, str]] = None,
        wait: Optional[float] = None,
    ) -> None:
        super().__init__(f"{code.name} {reason or ''}: {message}")
        self.code = code
        # A name of ErrorReason in the proto, such as "GROUP_NOT_FOUND".
        self.reason = reason
        # "backend", "request_id" and others, as in the README.
        self.metadata = metadata or {}
        # What is wrong with each field, for INVALID_ARGUMENT.
        self.fields = fields or {}
        # Seconds after which it makes sense to try again; None where it does not.
        self.wait = wait


class NotFound(Failure):
    """No group at this key, or it has expired."""

    @property
    def authoritative(self) -> bool:
        """False if memory answers, which cannot know what others hold: who has
        seen the group must not forget it then."""
        return self.metadata.get("authoritative") != "false"


class OutcomeUnknown(Failure):
    """It cannot be told whether a write happened: the answer was lost on its way
    from Redis, or on its way to us. Load the group and apply the change again."""


class Unreachable(Failure):
    """No instance can be reached, so nothing was sent."""

    def __init__(self, addresses: Iterable[str]) -> None:
        message = f"no instance can be reached: {', '.join(addresses)}"
        super().__init__(grpc.StatusCode.UNAVAILABLE, None, message, wait=FIRST_BACKOFF)


# Reasons that leave open what became of a write. So does a status without any:
# it is not of the service but of the gRPC library, as a connection that broke.
UNKNOWN = {None, "OUTCOME_UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL"}


def failure_of(error: grpc.RpcError) -> Failure:
    """The failure that a `grpc.RpcError` stands for, with all its details."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    wait = None
    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        detail.Unpack(info) or detail.Unpack(bad_request)
        if detail.Unpack(retry):
            wait = retry.retry_delay.ToTimedelta().total_seconds()
    fields = {v.field: v.description for v in bad_request.field_violations}
    reason = info.reason if info.domain == "groupstate" else None
    if reason == "LISTING_RESTARTED":
        wait = 0  # from the beginning, at once
    if reason in UNKNOWN:
        kind = OutcomeUnknown
    else:
        kind = NotFound if reason == "GROUP_NOT_FOUND" else Failure
    metadata = dict(info.metadata)
    return kind(error.code(), reason, error.details(), metadata, fields, wait)


def attempts() -> Iterator[None]:
    """The turns of a loop that tries again, each after a pause. Its length is
    random, so that two clients which have met once do not go on meeting."""
    give_up_at, longest = time.monotonic() + PATIENCE, FIRST_BACKOFF
    yield
    while time.monotonic() < give_up_at:
        time.sleep(random.uniform(0, longest))
        longest = min(2 * longest, LONGEST_BACKOFF)
        yield


# === Which instance a key belongs to ===
#
# Rendezvous hashing: every instance has a score for the key, and the highest one
# serves it. When an instance leaves, only its own keys move, each to the next in
# its rank. All clients must agree, whatever language they are written in, so the
# rule is fixed (tests/data/rendezvous-vectors.json has examples):
#
#     score(address, key) = fmix64(fnv1a64(address + "\n" + key))
#
# over the bytes of UTF-8; the address is IP:PORT, with an IPv6 in brackets. The
# scores are compared as unsigned numbers. Equal ones, if that ever happens, are
# ordered by address.

U64 = 2**64 - 1


def score(address: str, key: str) -> int:
    """FNV-1a, which every language can do, and behind it the finalizer of
    MurmurHash3: FNV alone leaves the high bits of similar addresses alike."""
    h = 0xCBF29CE484222325
    for byte in f"{address}\n{key}".encode():
        h = (h ^ byte) * 0x100000001B3 & U64
    h = (h ^ h >> 33) * 0xFF51AFD7ED558CCD & U64
    h = (h ^ h >> 33) * 0xC4CEB9FE1A85EC53 & U64
    return h ^ h >> 33


def rank(addresses: Iterable[str], key: str) -> list[str]:
    """All addresses; the first one serves the key, the next one if it is down."""
    return sorted(addresses, key=lambda address: (-score(address, key), address))


def resolve(targets: Iterable[str]) -> set[str]:
    """The addresses behind targets such as "groupstate.alert-history.svc:50051"."""
    addresses = set()
    for target in targets:
        host, _, port = target.rpartition(":")
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        for family, _, _, _, (ip, port_number, *_) in found:
            ip = f"[{ip}]" if family == socket.AF_INET6 else ip
            addresses.add(f"{ip}:{port_number}")
    return addresses


# === One instance ===


class Instance:
    """A connection to one instance of the service."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self.groups = services.GroupStateServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self._connected = False
        self.channel.subscribe(self._notice)

    def _notice(self, state: grpc.ChannelConnectivity) -> None:
        self._connected = state == grpc.ChannelConnectivity.READY

    def call(self, method: Any, request: Any, timeout: float = CALL_TIMEOUT) -> Any:
        """The reply of a call, or its `Failure`."""
        with self._failures():
            return method(request, timeout=timeout)

    def stream(self, method: Any, request: Any, timeout: float) -> Iterator[Any]:
        """The replies of a call, and at their end its `Failure`, if any."""
        with self._failures():
            yield from method(request, timeout=timeout)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            failure = failure_of(error)
            if isinstance(failure, OutcomeUnknown):
                self._connected = False  # or it hangs: ask before the next call
            raise failure from error

    def is_up(self) -> bool:
        """Whether a call can be sent. Where that is in doubt, a question about health
        is sent before: of a write it could not be told whether it has arrived."""
        if not self._connected:
            try:
                self._connected = self._is_serving("")
            except Failure:
                return False
        return self._connected

    def has_redis(self) -> bool:
        """Whether this instance gets its answers from Redis, not from its own memory.
        One that was started without Redis does not know this name."""
        try:
            return self._is_serving("redis")
        except Failure as failure:
            if failure.code == grpc.StatusCode.NOT_FOUND:
                return False
            raise

    def _is_serving(self, service: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = self.call(self.health.Check, request, CONNECT_TIMEOUT)
        return reply.status == health_pb2.HealthCheckResponse.SERVING


# === The client ===


class Client:
    """A client of all instances. May be used by many threads.

    `targets` are `HOST:PORT`; all addresses of a host are used, such as those of a
    headless Service of Kubernetes.
    """

    def __init__(self, targets: Iterable[str]) -> None:
        self._targets = list(targets)
        self._known = resolve(self._targets)
        self._resolved_at = time.monotonic()
        self._instances: dict[str, Instance] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        for instance in self._instances.values():
            instance.channel.close()

    # Groups

    def load(self, key: str) -> pb.LoadResponse:
        """A `LoadResponse`; `NotFound` if there is no such group."""
        request = pb.LoadRequest(key=key, include_expire_time=True)
        return self._read(key, lambda i: i.call(i.groups.Load, request))

    def store(self, group: pb.AlertGroup, **expiry: Any) -> pb.StoreResponse:
        """Stores a group whatever is there: for groups that nobody else changes.
        It expires after `ttl={"seconds": 3600}`, as before with `keep_ttl=True`, or
        after the server's default. `OutcomeUnknown` says that it may or may not have
        been stored; it is not tried again, as others may have stored since."""
        request = pb.StoreRequest(group=group, **expiry)
        instance = self._instance_of(group.key)
        return instance.call(instance.groups.Store, request)

    def delete(
        self, key: str, expected_version: Optional[int] = None
    ) -> pb.DeleteResponse:
        """Deletes a group, or that version of it only."""
        request = pb.DeleteRequest(key=key, expected_version=expected_version)
        instance = self._instance_of(key)
        return instance.call(instance.groups.Delete, request)

    def change(
        self, key: str, apply: Callable[[pb.AlertGroup], object], **expiry: Any
    ) -> pb.CompareAndSwapResponse:
        """Changes a group that others change at the same moment, and loses nothing.

        `apply` gets the group as it is, or a new one without alerts, and changes it
        in place. It is called again after a lost race, with what is stored by then:
        so it must be the change (add this alert), not its result (store these
        alerts), and must not mind to meet itself. Merging two whole groups instead
        would bring back what others have removed.

        Returns the `CompareAndSwapResponse` of the swap that succeeded. If its
        backend is BACKEND_MEMORY and the service runs with `--on-recovery discard`,
        the change is gone when Redis comes back: remember it, and make it again.
        """
        group, failure = None, None
        for _ in attempts():
            try:
                if group is None:
                    # The loop stays with this instance: while Redis is down, versions
                    # are those of its memory.
                    instance = self._instance_of(key)
                    group, version = load_or_new(instance, key)
                apply(group)
                request = pb.CompareAndSwapRequest(
                    group=group, expected_version=version, **expiry
                )
                reply = instance.call(instance.groups.CompareAndSwap, request)
            except OutcomeUnknown as lost:
                # As after a lost race, whose winner may be we ourselves.
                group, failure = None, lost
            except Failure as refused:
                if refused.wait is None:
                    raise
                group, failure = None, refused
                time.sleep(refused.wait)
            else:
                if reply.swapped:
                    return reply
                # The winner's group came with the answer: no Load is needed. If there
                # is none, the group is gone, version is 0, and it is created anew.
                group, version = pb.AlertGroup(key=key), reply.version
                if reply.HasField("current"):
                    group = reply.current
                failure = Failure(grpc.StatusCode.ABORTED, None, "every race was lost")
        raise failure

    # All groups. While Redis is down, each instance knows its own only.

    def list_keys(self, prefix: str = "", page_size: int = 0) -> set[str]:
        """The keys of all groups, page by page."""

        def listing(instance):
            keys, token = set(), ""
            while True:
                request = pb.ListKeysRequest(
                    prefix=prefix, page_size=page_size, page_token=token
                )
                page = instance.call(instance.groups.ListKeys, request, LISTING_TIMEOUT)
                keys.update(page.keys)  # keys may repeat
                token = page.next_page_token
                # Nothing else ends a listing: a page may be empty and not the last.
                if not token:
                    return keys

        return self._read(prefix, listing)

    def load_all(
        self, prefix: str = ""
    ) -> tuple[dict[str, pb.AlertGroup], list[pb.GroupError], pb.LoadAllSummary]:
        """All groups by key, the problems, and the summary, as after a restart.

        Look at all three: a problem is a group that is stored and cannot be read,
        and `summary.complete` is False when memory has answered in place of Redis
        and cannot know every group.
        """

        def loading(instance):
            groups, problems, summary = {}, [], None
            request = pb.LoadAllRequest(prefix=prefix)
            replies = instance.stream(instance.groups.LoadAll, request, LISTING_TIMEOUT)
            for reply in replies:
                # A group may come twice, and the later one is newer.
                groups.update((group.key, group) for group in reply.groups)
                problems.extend(reply.problems)
                if reply.HasField("summary"):
                    summary = reply.summary
            if summary is None:
                what = "the stream has ended without its summary"
                raise OutcomeUnknown(grpc.StatusCode.DATA_LOSS, None, what)
            return groups, problems, summary

        return self._read(prefix, loading)

    def redis_health(self) -> dict[str, bool]:
        """Whether Redis answers, by the address of each instance that is up. Calls
        are answered either way: this is for a dashboard, not for a decision."""
        instances = [self._instance(address) for address in self._addresses()]
        return {i.address: i.has_redis() for i in instances if i.is_up()}

    # Instances

    def _read(self, key: str, read: Callable[[Instance], T]) -> T:
        """What `read` gets from an instance. Reads may be repeated, so the next
        instance is asked when one does not answer."""
        failure = None
        for _ in attempts():
            try:
                for instance in self._instances_of(key):
                    try:
                        return read(instance)
                    except OutcomeUnknown as lost:
                        failure = lost
            except Failure as refused:
                if refused.wait is None:
                    raise
                failure = refused
                time.sleep(refused.wait)
        raise failure

    def _instance_of(self, key: str) -> Instance:
        return next(self._instances_of(key))

    def _instances_of(self, key: str) -> Iterator[Instance]:
        """The instances that are up, as they rank for a key."""
        addresses = rank(self._addresses(), key)
        some_is_up = False
        for address in addresses:
            instance = self._instance(address)
            if instance.is_up():
                some_is_up = True
                yield instance
        if not some_is_up:
            raise Unreachable(addresses)

    def _addresses(self) -> set[str]:
        """What the targets stand for, or did a short while ago."""
        with self._lock:
            if time.monotonic() > self._resolved_at + RESOLVE_EVERY:
                self._resolved_at = time.monotonic()
                # Aside, as a slow DNS must not hold up alerts.
                threading.Thread(target=self._resolve, daemon=True).start()
            return self._known

    def _resolve(self) -> None:
        try:
            known = resolve(self._targets)
        except OSError:
            return  # we go on with what we have
        with self._lock:
            self._known = known
            gone = [self._instances.pop(a) for a in self._instances.keys() - known]
        for instance in gone:
            instance.channel.close()

    def _instance(self, address: str) -> Instance:
        with self._lock:
            if address not in self._instances:
                self._instances[address] = Instance(address)
            return self._instances[address]


def load_or_new(instance: Instance, key: str) -> tuple[pb.AlertGroup, int]:
    """A group and the version to expect when it is swapped; 0 creates it."""
    try:
        request = pb.LoadRequest(key=key)
        group = instance.call(instance.groups.Load, request).group
    except NotFound:
        return pb.AlertGroup(key=key), 0
    return group, group.metadata.version
