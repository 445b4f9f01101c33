"""A client of groupstate that sends what comes to its mind.

    python tests/front_door/random_client.py HOST:PORT PID SECONDS SEED

Three kinds of it, one after the other, until the time is over: bytes as HTTP/2
on a connection of their own (frames of any kind, messages whose length or flag
is wrong), bytes as the message of a call, and messages with fields of the right
numbers and mostly right types: extreme numbers, long and malformed strings,
repeated keys, fields that nobody knows, and deep nesting.

It fails when a call ends with a status that the contract does not have for what
a client may send, when the memory of the process PID does not stay flat, and
when a group is not stored and loaded as it should be at the end. It prints how
often each status came. SEED makes the same calls again, but for versions and
page tokens.
"""

import collections
import os
import pathlib
import random
import socket
import struct
import sys
import tempfile
import time

import grpc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "clients"))
from client import SERVICE, compile_proto  # noqa: E402

# Seconds that a call gets. All of them are answered at once.
SOON = 20

# Seconds that a malformed connection is listened to: what the server does not
# close by then waits for more.
LISTEN = 0.02

# Fewer calls show nothing: a machine that is busy takes longer.
LEAST_CALLS = 300

# Bytes by which the process may grow after the first third of the time: the
# allocator keeps some of what the largest requests have taken.
MOST_GROWTH = 48 << 20

# What a call may end with whose message came whole. All others are faults of
# the server, INTERNAL and UNKNOWN above all: it is near, it is not busy, and
# its methods exist. On malformed connections any end is right but "error" in
# the metrics of the server.
ALLOWED = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "ABORTED",  # a page token of another server
}

METHODS = [
    "Store",
    "Load",
    "Delete",
    "CompareAndSwap",
    "StoreAll",
    "ListKeys",
    "Size",
    "LoadAll",
]

KEYS = [f"key {number}" for number in range(30)]
INTEGERS = [0, 1, -1, 2, 16, 1_000, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63)]
SECONDS = [0, 1, 60, 1_700_000_000, -62_135_596_800, 253_402_300_799, 253_402_300_800]
NANOS = [0, 1, 999_999_999, 1_000_000_000, -1, 2**31 - 1]

# A message becomes about as large as this at most, or making it takes most of the time.
ROOM = 300_000

# The kinds of fields on the wire.
VARINT, FIXED64, BYTES, START, END, FIXED32 = range(6)


def varint(number):
    number &= 2**64 - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def tagged(number, kind, value):
    value = varint(len(value)) + value if kind == BYTES else value
    return varint(number << 3 | kind) + value


def nested(number, depth):
    """Messages in messages, so deep."""
    message = b""
    for _ in range(depth):
        message = tagged(number, BYTES, message)
    return message


# Decoders go 100 deep.
DEPTHS = {depth: nested(15, depth) for depth in [1, 90, 110, 1_000]}


class Messages:
    """Makes messages by their descriptors, some of them bad."""

    def __init__(self, rng):
        self.rng = rng
        # Of the message that is being made: how often a value is bad, and bytes that
        # are left.
        self.badness = 0.0
        self.room = 0
        self.versions = collections.deque([1], maxlen=50)
        self.tokens = collections.deque([""], maxlen=10)

    def message(self, descriptor):
        self.badness = self.rng.choice([0, 0, 0.01, 0.1, 0.5])
        self.room = ROOM
        made = self.fields(descriptor, {})
        if self.bad():
            made = self.damaged(made)
        return made

    def bad(self):
        return self.rng.random() < self.badness

    def fields(self, descriptor, given):
        """A message of this type, with these fields as they are given."""
        fields = list(descriptor.fields)
        if descriptor.name.endswith("Request"):
            # One way to say when it expires is enough.
            expiry = [field for field in fields if field.name in ("ttl", "keep_ttl")]
            for field in expiry[: self.rng.randrange(len(expiry) + 1) if expiry else 0]:
                fields.remove(field)
        if self.bad():
            self.rng.shuffle(fields)
        out = b""
        for field in fields:
            if field.name in ("ttl", "keep_ttl") and self.rng.random() < 0.5:
                continue
            times = 0 if self.bad() else 1
            if field.is_repeated:
                times = self.rng.choice([0, 1, 1, 2, 3])
            if self.bad():
                times = self.rng.choice([2, 50])
            for _ in range(times):
                if self.room > 0:
                    out += self.field(field, given)
            if self.bad():
                out += self.unknown()
        return out

    def field(self, field, given):
        self.room -= 10
        if self.bad():
            # Of another type.
            return self.rng.choice(
                [
                    tagged(field.number, VARINT, varint(self.rng.choice(INTEGERS))),
                    tagged(field.number, BYTES, self.rng.randbytes(5)),
                    tagged(field.number, FIXED32, self.rng.randbytes(4)),
                    tagged(field.number, FIXED64, self.rng.randbytes(8)),
                ]
            )
        if field.message_type is None:
            if field.type == field.TYPE_STRING:
                text = given.get(field.name)
                text = self.text(field.name) if text is None or self.bad() else text
                self.room -= len(text)
                return tagged(field.number, BYTES, text)
            return tagged(field.number, VARINT, varint(self.number(field)))
        message = field.message_type
        if message.GetOptions().map_entry:
            key = self.text("fingerprint")
            value = message.fields_by_name["value"]
            entry = tagged(1, BYTES, key)
            if not self.bad():
                entry += self.field(value, {"fingerprint": key})
            return tagged(field.number, BYTES, entry)
        # The value of an alert by its fingerprint; of others nothing is given.
        passed = given if message.name == "Alert" else {}
        return tagged(field.number, BYTES, self.fields(message, passed))

    def number(self, field):
        if self.bad():
            return self.rng.choice(INTEGERS)
        if field.enum_type:
            return self.rng.choice(field.enum_type.values[1:]).number
        if field.name == "seconds":
            return self.rng.choice(SECONDS if self.bad() else SECONDS[1:3])
        if field.name == "nanos":
            return self.rng.choice(NANOS if self.bad() else NANOS[:3])
        if field.name == "expected_version":
            return self.rng.choice(self.versions)
        return self.rng.choice([0, 1, 16])

    def text(self, name):
        if self.bad():
            return self.rng.choice(
                [
                    b"",
                    b"\x01probe:",
                    b"\x00",
                    b"\xff\xfe",
                    b"\xed\xa0\x80",
                    "\U0001f525\u202e".encode(),
                    b"*?[]\\{}",
                    b'"},"version":7}',
                    b"x" * 5_000,
                    b"\x1b" * 100_000,
                ]
            )
        if name in ("key", "prefix"):
            key = self.rng.choice(KEYS)
            return key[: 5 if name == "prefix" else None].encode()
        if name == "page_token":
            token = bytearray(self.rng.choice(self.tokens).encode())
            if token and self.rng.random() < 0.5:
                token[self.rng.randrange(len(token))] = self.rng.randrange(256)
            return bytes(token)
        return self.rng.choice([b"a", b"alertname", "\u0436".encode(), b"0123456789abcdef"])

    def unknown(self):
        """A field that nobody knows."""
        number = self.rng.choice([15, 16, 999, 2**29 - 1])
        depth, nested = self.rng.choice(list(DEPTHS.items()))
        self.room -= 10 * depth
        return self.rng.choice(
            [
                tagged(number, VARINT, varint(1)),
                tagged(number, BYTES, b"x"),
                nested,
                varint(number << 3 | START) * depth + varint(number << 3 | END) * depth,
                varint(number << 3 | END),
                varint(0),
            ]
        )

    def damaged(self, message):
        """The message, cut or with some other bytes."""
        message = bytearray(message)
        if message and self.rng.random() < 0.5:
            del message[self.rng.randrange(len(message)) :]
        for _ in range(min(len(message), self.rng.choice([1, 3, 20]))):
            message[self.rng.randrange(len(message))] = self.rng.randrange(256)
        return bytes(message)


# HTTP/2 as bytes

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4


def frame(kind, flags, stream, payload):
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", stream) + payload


def headers(method, *more):
    """The headers of a call, as HPACK without any compression."""
    block = b"\x83\x86"  # :method POST, :scheme http
    path = f"/{SERVICE}/{method}".encode()
    for name, value in [
        (b"\x04", path),
        (b"\x01", b"localhost"),
        (b"\x0f\x10", b"application/grpc"),
        (b"\x00\x02te", b"trailers"),
        *more,
    ]:
        block += name + bytes([len(value)]) + value
    return block


def framed(rng, message):
    """A message as gRPC sends it, but for one thing."""
    length = len(message)
    flag, length = rng.choice(
        [
            (0, length),
            (1, length),
            (rng.randrange(256), length),
            (0, length + 1),
            (0, max(0, length - 1)),
            (0, 2**32 - 1),
            (0, rng.randrange(2**24)),
        ]
    )
    body = bytes([flag]) + struct.pack(">I", length) + message
    cut = rng.choice([len(body), len(body), rng.randrange(len(body) + 1)])
    return body[:cut] * rng.choice([1, 1, 2])


def malformed_connection(rng, messages, descriptors, address):
    host, port = address.rsplit(":", 1)
    method = rng.choice(METHODS)
    out = PREFACE + frame(SETTINGS, 0, 0, b"")
    how = rng.randrange(3)
    if how == 0:
        out += rng.randbytes(rng.choice([1, 9, 100, 5_000]))
    elif how == 1:
        for _ in range(rng.randrange(1, 10)):
            payload = rng.randbytes(rng.choice([0, 4, 5, 6, 8, 100]))
            stream = rng.choice([0, 1, 2, 3, 2**31 - 1, 2**32 - 1])
            out += frame(rng.randrange(12), rng.randrange(256), stream, payload)
    else:
        encoding = [(b"\x00\x0dgrpc-encoding", rng.choice([b"gzip", b"x", b"identity"]))]
        timeout = [(b"\x00\x0cgrpc-timeout", rng.choice([b"99999999H", b"0n", b"-1S", b"1"]))]
        more = rng.choice([[], encoding, timeout])
        out += frame(HEADERS, END_HEADERS, 1, headers(method, *more))
        body = framed(rng, messages.message(descriptors[method])[:10_000])
        out += frame(DATA, rng.choice([0, END_STREAM]), 1, body)
    try:
        with socket.create_connection((host, int(port)), timeout=SOON) as connection:
            connection.sendall(out)
            connection.settimeout(LISTEN)
            while connection.recv(65_536):
                pass
        return "closed"
    except TimeoutError:
        return "waits"
    except OSError:
        return "reset"


class Calls:
    """Calls with messages that are bytes, and what comes of them."""

    def __init__(self, address, messages, pb):
        self.messages = messages
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.max_receive_message_length", -1)]
        )
        self.replies = {
            method: getattr(pb, f"{method}Response") for method in METHODS
        }

    def make(self, method, message):
        """The status of a call; what it tells is used in later ones."""
        path = f"/{SERVICE}/{method}"
        try:
            if method == "LoadAll":
                replies = list(self.channel.unary_stream(path)(message, timeout=SOON))
            else:
                replies = [self.channel.unary_unary(path)(message, timeout=SOON)]
        except grpc.RpcError as error:
            status = error.code().name
            assert status in ALLOWED, f"{method}: {error}, {message[:1_000]!r}"
            return status
        for reply in replies:
            reply = self.replies[method].FromString(reply)
            if method in ("Store", "CompareAndSwap"):
                self.messages.versions.append(reply.version)
            if method == "ListKeys":
                self.messages.tokens.append(reply.next_page_token)
        return "OK"


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_serves(calls, pb):
    group = pb.AlertGroup(key="at the end")
    group.alerts["f"].fingerprint = "f"
    group.alerts["f"].status = pb.ALERT_STATUS_FIRING
    group.metadata.state = pb.GROUP_STATE_FIRING
    request = pb.StoreRequest(group=group).SerializeToString()
    call = calls.channel.unary_unary(f"/{SERVICE}/Store")
    stored = pb.StoreResponse.FromString(call(request, timeout=SOON))
    call = calls.channel.unary_unary(f"/{SERVICE}/Load")
    request = pb.LoadRequest(key="at the end").SerializeToString()
    loaded = pb.LoadResponse.FromString(call(request, timeout=SOON)).group
    assert loaded.metadata.version == stored.version > 0, loaded
    assert loaded.alerts == group.alerts, loaded


def main(address, pid, seconds, seed):
    rng = random.Random(int(seed))
    with tempfile.TemporaryDirectory() as folder:
        pb, _ = compile_proto(folder)
    methods = pb.DESCRIPTOR.services_by_name["GroupStateService"].methods
    assert sorted(METHODS) == sorted(method.name for method in methods)
    descriptors = {method.name: method.input_type for method in methods}
    messages = Messages(rng)
    calls = Calls(address, messages, pb)
    seen = collections.Counter()

    def go_on_until(moment):
        least = seen.total() + LEAST_CALLS / 2
        while time.monotonic() < moment or seen.total() < least:
            method = rng.choice(METHODS)
            kind = rng.choice(["connection", "bytes", "bytes"] + ["message"] * 7)
            if kind == "connection":
                end = malformed_connection(rng, messages, descriptors, address)
            elif kind == "bytes":
                end = calls.make(method, rng.randbytes(rng.choice([0, 1, 2, 10, 100, 9_999])))
            else:
                end = calls.make(method, messages.message(descriptors[method]))
            seen[f"{kind}: {end}"] += 1

    begin = time.monotonic()
    go_on_until(begin + float(seconds) / 3)
    warm = resident_bytes(pid)
    go_on_until(begin + float(seconds))
    end = resident_bytes(pid)
    assert_serves(calls, pb)
    for what, times in sorted(seen.items()):
        print(f"{times:>8}  {what}")
    print(f"memory {warm >> 20} MiB after a third of the time, {end >> 20} MiB at the end")
    assert end - warm < MOST_GROWTH, "memory grows"
    # Enough of each kind came through, or nothing was tried.
    for what in ["message: OK", "message: INVALID_ARGUMENT", "bytes: INVALID_ARGUMENT"]:
        assert seen[what] > 10, what


if __name__ == "__main__":
    main(*sys.argv[1:])
