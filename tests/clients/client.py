"""A client of groupstate in Python, which has never seen the service's code.

    python tests/clients/client.py HOST:PORT redis|memory
    python tests/clients/client.py HOST:PORT hung

The first makes every call of the API against a service that answers from Redis
or from memory, and prints "ok" if every answer is as the proto promises. The
second is for a service whose Redis hangs: memory has to answer.

The stubs are made from the proto on the spot; the details of a status, whose
types the proto does not import, are looked up by reflection.
"""

import importlib
import pathlib
import sys
import tempfile
import time

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc

PROTO_ROOT = pathlib.Path(__file__).resolve().parents[2] / "proto"
PROTO = "groupstate/v1/group_state.proto"
SERVICE = "groupstate.v1.GroupStateService"

# Seconds that a call gets which should be answered at once.
SOON = 10


def compile_proto(folder):
    """The modules of messages and stubs that protoc makes of the proto."""
    google = pathlib.Path(protoc.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTO_ROOT}", f"-I{google}"]
    arguments += [f"--python_out={folder}", f"--grpc_python_out={folder}", PROTO]
    assert protoc.main(arguments) == 0, "protoc refuses the proto"
    sys.path.insert(0, folder)
    return (
        importlib.import_module("groupstate.v1.group_state_pb2"),
        importlib.import_module("groupstate.v1.group_state_pb2_grpc"),
    )


class Client:
    """The stubs of one connection, and what to expect from the service."""

    def __init__(self, address, backend, pb, pb_grpc):
        self.channel = grpc.insecure_channel(address)
        self.stub = pb_grpc.GroupStateServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.pb = pb
        self.backend_name = backend
        self.backend = pb.Backend.Value(f"BACKEND_{backend.upper()}")
        database = ProtoReflectionDescriptorDatabase(self.channel)
        self.reflected = DescriptorPool(database)

    def group(self, key, *fingerprints):
        """A group in which these alerts fire."""
        group = self.pb.AlertGroup(key=key)
        for fingerprint in fingerprints:
            alert = group.alerts[fingerprint]
            alert.fingerprint = fingerprint
            alert.alert_name = "HighCPU"
            alert.status = self.pb.ALERT_STATUS_FIRING
            alert.labels["alertname"] = "HighCPU"
            alert.annotations["summary"] = "CPU is high: 93\u00a0%"
            alert.starts_at.FromJsonString("2026-11-23T05:00:00.123456789Z")
        group.metadata.state = self.pb.GROUP_STATE_FIRING
        group.metadata.firing_count = len(fingerprints)
        group.metadata.group_by.append("alertname")
        return group

    def store(self, group, **expiry):
        request = self.pb.StoreRequest(group=group, **expiry)
        return self.stub.Store(request, timeout=SOON)

    def load(self, key, **options):
        request = self.pb.LoadRequest(key=key, **options)
        return self.stub.Load(request, timeout=SOON)

    def swap(self, group, expected_version):
        request = self.pb.CompareAndSwapRequest(
            group=group, expected_version=expected_version
        )
        return self.stub.CompareAndSwap(request, timeout=SOON)

    def delete(self, key, **version):
        request = self.pb.DeleteRequest(key=key, **version)
        return self.stub.Delete(request, timeout=SOON)

    def details(self, error):
        """The details of a status by the names of their types."""
        status = self.reflected_class("google.rpc.Status")()
        status.ParseFromString(metadata_of(error)["grpc-status-details-bin"])
        assert status.code == error.code().value[0], status
        assert status.message == error.details(), status
        details = {}
        for any_ in status.details:
            detail = self.reflected_class(any_.TypeName())()
            assert any_.Unpack(detail)
            details[any_.TypeName().removeprefix("google.rpc.")] = detail
        return details

    def reflected_class(self, name):
        return GetMessageClass(self.reflected.FindMessageTypeByName(name))


def metadata_of(call):
    """What came with a reply; of an error everything comes at the end."""
    return dict(call.initial_metadata() or ()) | dict(call.trailing_metadata() or ())


def failure_of(call):
    """The error that a call must end with."""
    try:
        reply = call()
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"expected an error, got {reply}")


# Groups


def a_stored_group_is_loaded_as_it_was(client):
    group = client.group("alertname=HighCPU", "a1", "a2")
    before = time.time()
    stored = client.store(group)
    assert stored.version > 0 and stored.backend == client.backend, stored
    # The default time to live is 24 hours.
    day = stored.expire_time.ToDatetime().timestamp() - before
    assert abs(day - 24 * 3600) < 60, day

    loaded = client.load(group.key, include_expire_time=True)
    assert loaded.group.metadata.version == stored.version, loaded
    assert loaded.group.metadata.write_id, loaded
    assert loaded.expire_time.seconds > before, loaded
    # Both are output only.
    loaded.group.metadata.ClearField("version")
    loaded.group.metadata.ClearField("write_id")
    assert loaded.group == group, loaded

    assert not client.load(group.key).HasField("expire_time")


def a_time_to_live_is_kept_or_set(client):
    group = client.group("ttl", "a1")
    hour = client.store(group, ttl={"seconds": 3600}).expire_time.seconds
    assert abs(hour - time.time() - 3600) < 60
    kept = client.store(group, keep_ttl=True).expire_time.seconds
    assert abs(kept - hour) <= 1, (kept, hour)


def of_two_swaps_one_loses_and_is_shown_what_won(client):
    group = client.group("swap", "a1")
    created = client.swap(group, 0)
    assert created.swapped and created.version > 0, created

    again = client.swap(group, 0)
    assert not again.swapped and again.version == created.version, again
    assert again.current.metadata.version == created.version, again
    assert set(again.current.alerts) == {"a1"}, again

    won = client.swap(client.group("swap", "a1", "a2"), created.version)
    assert won.swapped and won.version > created.version, won
    assert not won.HasField("current"), won

    lost = client.swap(client.group("swap", "a1", "a3"), created.version)
    assert not lost.swapped and lost.version == won.version, lost
    assert set(lost.current.alerts) == {"a1", "a2"}, lost

    # The change once more, on what won: no second Load is needed.
    lost.current.alerts["a3"].CopyFrom(client.group("swap", "a3").alerts["a3"])
    assert client.swap(lost.current, lost.version).swapped
    assert set(client.load("swap").group.alerts) == {"a1", "a2", "a3"}


def a_version_that_is_gone_cannot_be_swapped(client):
    absent = client.swap(client.group("never stored", "a1"), 42)
    assert not absent.swapped and absent.version == 0, absent
    assert not absent.HasField("current"), absent


def a_group_is_deleted_by_version_or_without(client):
    version = client.store(client.group("delete", "a1")).version
    kept = client.delete("delete", expected_version=version + 1)
    assert not kept.deleted and kept.version == version, kept
    gone = client.delete("delete", expected_version=version)
    assert gone.deleted and gone.version == version, gone
    absent = client.delete("delete")
    assert not absent.deleted and absent.version == 0, absent


def a_batch_is_stored_and_one_bad_group_fails_alone(client):
    groups = [client.group(f"batch {number}", "a1") for number in range(3)]
    groups[1].metadata.ClearField("state")
    request = client.pb.StoreAllRequest(groups=groups, ttl={"seconds": 60})
    reply = client.stub.StoreAll(request, timeout=SOON)
    assert reply.backend == client.backend, reply
    assert [result.key for result in reply.results] == [group.key for group in groups]
    first, bad, last = reply.results
    assert first.version > 0 and not first.HasField("error"), first
    assert last.version > 0 and not last.HasField("error"), last
    assert bad.version == 0, bad
    assert bad.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0], bad
    assert bad.error.reason == client.pb.ERROR_REASON_INVALID_FIELD, bad


def listings_show_every_group_and_only_those_of_a_prefix(client):
    keys = {f"list*{number}" for number in range(25)}
    groups = [client.group(key, "a1") for key in sorted(keys)]
    client.store(client.group("lister", "a1"))
    request = client.pb.StoreAllRequest(groups=groups)
    versions = {
        result.key: result.version
        for result in client.stub.StoreAll(request, timeout=SOON).results
    }

    listed, token = set(), ""
    while True:
        request = client.pb.ListKeysRequest(
            prefix="list*", page_size=10, page_token=token
        )
        page = client.stub.ListKeys(request, timeout=SOON)
        listed.update(page.keys)
        token = page.next_page_token
        if not token:
            break
    assert listed == keys, listed

    request = client.pb.SizeRequest(prefix="list*")
    size = client.stub.Size(request, timeout=SOON)
    assert size.count == 25 and size.backend == client.backend, size

    request = client.pb.LoadAllRequest(prefix="list*")
    *messages, last = client.stub.LoadAll(request, timeout=SOON)
    assert not any(message.HasField("summary") for message in messages)
    loaded = {
        group.key: group.metadata.version
        for message in [*messages, last]
        for group in message.groups
    }
    assert loaded == versions, loaded
    assert last.summary.groups == 25 and last.summary.problems == 0, last
    assert last.summary.complete, last


# What comes with a call


def an_absent_group_is_not_found_with_a_reason(client):
    error = failure_of(lambda: client.load("absent"))
    assert error.code() == grpc.StatusCode.NOT_FOUND, error
    info = client.details(error)["ErrorInfo"]
    assert (info.reason, info.domain) == ("GROUP_NOT_FOUND", "groupstate"), info
    assert info.metadata["backend"] == client.backend_name, info
    assert info.metadata["request_id"] == metadata_of(error)["x-request-id"], info
    # Memory cannot know that no other instance has it.
    expected = {"memory": "false", "redis": None}[client.backend_name]
    assert info.metadata.get("authoritative") == expected, info


def a_bad_request_names_each_field(client):
    group = client.group("bad", "a1")
    group.alerts["a1"].labels[""] = "no name"
    request = client.pb.StoreRequest(group=group, ttl={"nanos": 1})
    error = failure_of(lambda: client.stub.Store(request, timeout=SOON))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    details = client.details(error)
    assert details["ErrorInfo"].reason == "INVALID_FIELD", details
    violations = details["BadRequest"].field_violations
    fields = [violation.field for violation in violations]
    assert fields == ['group.alerts["a1"].labels', "ttl"], fields


def a_call_is_named_by_its_caller_and_the_instance_by_itself(client):
    request = client.pb.SizeRequest()

    def metadata(*sent):
        _, call = client.stub.Size.with_call(request, timeout=SOON, metadata=sent)
        return metadata_of(call)

    named = metadata(("x-request-id", "story-7"))
    unnamed = metadata()
    assert named["x-request-id"] == "story-7", named
    assert len(unnamed["x-request-id"]) > 0, unnamed
    assert unnamed["x-request-id"] != metadata()["x-request-id"]
    instance = named["x-groupstate-instance"]
    assert instance and unnamed["x-groupstate-instance"] == instance


def a_deadline_ends_a_call_that_would_go_on(client):
    began = time.monotonic()
    updates = client.health.Watch(health_pb2.HealthCheckRequest(), timeout=0.5)
    assert next(updates).status == health_pb2.HealthCheckResponse.SERVING
    error = failure_of(lambda: next(updates))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    assert 0.3 < time.monotonic() - began < 5


# What stands beside the service


def health_is_checked_and_watched(client):
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ["", SERVICE]:
        request = health_pb2.HealthCheckRequest(service=name)
        assert client.health.Check(request, timeout=SOON).status == serving
        updates = client.health.Watch(request, timeout=SOON)
        assert next(updates).status == serving
        updates.cancel()
    unknown = health_pb2.HealthCheckRequest(service="nobody")
    error = failure_of(lambda: client.health.Check(unknown, timeout=SOON))
    assert error.code() == grpc.StatusCode.NOT_FOUND, error


def both_reflections_list_and_describe_the_service(client):
    # The messages of both versions are the same, byte for byte.
    for version in ["v1", "v1alpha"]:
        reflect = client.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflect(iter([request]), timeout=SOON)
        names = {service.name for service in reply.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names, names

    described = client.reflected.FindServiceByName(SERVICE)
    compiled = client.pb.DESCRIPTOR.services_by_name["GroupStateService"]
    assert [m.name for m in described.methods] == [m.name for m in compiled.methods]


def a_hung_redis_holds_up_no_call(client):
    request = client.pb.LoadRequest(key="any")
    began = time.monotonic()
    # In a hurry: before memory takes over, a call may be at its end.
    error = failure_of(lambda: client.stub.Load(request, timeout=0.1))
    assert error.code() in (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.NOT_FOUND,
    ), error
    error = failure_of(lambda: client.stub.Load(request))
    assert error.code() == grpc.StatusCode.NOT_FOUND, error
    assert time.monotonic() - began < 2
    group = client.pb.AlertGroup(key="any")
    group.metadata.state = client.pb.GROUP_STATE_FIRING
    stored = client.stub.Store(client.pb.StoreRequest(group=group))
    assert stored.backend == client.pb.BACKEND_MEMORY, stored


STORIES = [
    a_stored_group_is_loaded_as_it_was,
    a_time_to_live_is_kept_or_set,
    of_two_swaps_one_loses_and_is_shown_what_won,
    a_version_that_is_gone_cannot_be_swapped,
    a_group_is_deleted_by_version_or_without,
    a_batch_is_stored_and_one_bad_group_fails_alone,
    listings_show_every_group_and_only_those_of_a_prefix,
    an_absent_group_is_not_found_with_a_reason,
    a_bad_request_names_each_field,
    a_call_is_named_by_its_caller_and_the_instance_by_itself,
    a_deadline_ends_a_call_that_would_go_on,
    health_is_checked_and_watched,
    both_reflections_list_and_describe_the_service,
]


def main(address, state):
    hung = state == "hung"
    with tempfile.TemporaryDirectory() as folder:
        client = Client(address, "redis" if hung else state, *compile_proto(folder))
    stories = [a_hung_redis_holds_up_no_call] if hung else STORIES
    with client.channel:
        for story in stories:
            print(story.__name__, flush=True)
            story(client)
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
