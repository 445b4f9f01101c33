"""Stories for the client in clients/python, which has to be installed.

    python tests/clients/python_example.py alone
    python tests/clients/python_example.py redis|down|gone HOST:PORT HOST:PORT

`alone` needs no service. `redis` is for two instances with one Redis, in which the
document of "unreadable" is none; `down` for when their Redis was killed after that;
`gone` for when the first instance was killed, too. Prints "ok" at the end.
"""

import concurrent.futures
import inspect
import itertools
import json
import pathlib
import sys
import time
import typing

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

import groupstate.client
from groupstate import (
    Client,
    Failure,
    NotFound,
    OutcomeUnknown,
    Unreachable,
    pb,
    rank,
    services,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]


def add(fingerprint):
    """The change "this alert fires"."""

    def apply(group):
        alert = group.alerts[fingerprint]
        alert.fingerprint, alert.status = fingerprint, pb.ALERT_STATUS_FIRING
        group.metadata.state = pb.GROUP_STATE_FIRING
        group.metadata.firing_count = len(group.alerts)

    return apply


def group_of(key, *fingerprints):
    group = pb.AlertGroup(key=key)
    for fingerprint in fingerprints:
        add(fingerprint)(group)
    return group


def failure_of(call, kind=Failure):
    try:
        reply = call()
    except kind as failure:
        return failure
    raise AssertionError(f"expected {kind.__name__}, got {reply}")


def change_by_several(targets, key, replicas=3, alerts=10):
    """Several replicas add alerts to one group: each one after the other, and all
    replicas at once."""
    clients = [Client(targets) for _ in range(replicas)]

    def add_all(replica):
        for n in range(alerts):
            clients[replica].change(key, add(f"{replica}-{n}"))

    with concurrent.futures.ThreadPoolExecutor(replicas) as pool:
        list(pool.map(add_all, range(replicas)))
    group = clients[0].load(key).group
    assert len(group.alerts) == group.metadata.firing_count == replicas * alerts, group
    for client in clients:
        client.close()


# Alone


def ranks_are_those_of_other_languages():
    vectors = json.loads((ROOT / "tests/data/rendezvous-vectors.json").read_text())
    assert len(vectors) > 10
    for vector in vectors:
        ranking = rank(vector["addresses"], vector["key"])
        assert ranking == vector["ranking"], (vector, ranking)


def everything_is_typed():
    folder = pathlib.Path(groupstate.client.__file__).parent
    assert (folder / "py.typed").exists()
    assert "class LoadResponse" in (folder / "v1/group_state_pb2.pyi").read_text()
    functions = [rank, *vars(groupstate.client).values(), *vars(Client).values()]
    functions = [f for f in functions if inspect.isfunction(f)]
    functions = [f for f in functions if f.__module__ == "groupstate.client"]
    assert len(functions) > 20
    for function in functions:
        hints = typing.get_type_hints(function)
        names = [n for n in inspect.signature(function).parameters if n != "self"]
        assert {*names, "return"} <= hints.keys(), (function, hints)


class Fake(services.GroupStateServiceServicer):
    """A service that gives these answers to swaps, and has one group."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.swaps = []
        self.group = None

    def Load(self, request, context):
        if self.group is None:
            reasoned(context, "GROUP_NOT_FOUND", code_pb2.NOT_FOUND)
        return pb.LoadResponse(group=self.group)

    def CompareAndSwap(self, request, context):
        self.swaps.append(request)
        return self.answers.pop(0)(request, context)

    def ListKeys(self, request, context):
        return self.answers.pop(0)(request, context)

    def LoadAll(self, request, context):
        yield from self.answers.pop(0)(request, context)

    def serve(self):
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        services.add_GroupStateServiceServicer_to_server(self, server)
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return server, Client([f"127.0.0.1:{port}"])


def reasoned(context, reason, code, wait=None):
    """Ends a call as the service does."""
    details = [error_details_pb2.ErrorInfo(domain="groupstate", reason=reason)]
    if wait is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay={"nanos": wait}))
    packed = [any_pb2.Any() for _ in details]
    for any_, detail in zip(packed, details):
        any_.Pack(detail)
    status = status_pb2.Status(code=code, message="as the test wants", details=packed)
    context.abort_with_status(rpc_status.to_status(status))


def a_change_of_unknown_outcome_is_applied_to_what_is_stored():
    def lost(request, context):
        # It had succeeded, and another writer came after it.
        fake.group = group_of("g", "a1", "b1")
        fake.group.metadata.version = 32
        reasoned(context, "OUTCOME_UNKNOWN", code_pb2.ABORTED)

    def overloaded(request, context):
        reasoned(context, "OVERLOADED", code_pb2.RESOURCE_EXHAUSTED, wait=1_000_000)

    def swapped(request, context):
        return pb.CompareAndSwapResponse(swapped=True, version=48)

    fake = Fake(lost, overloaded, swapped)
    server, client = fake.serve()
    with client:
        assert client.change("g", add("a1")).version == 48
    server.stop(None)
    expected = [(s.expected_version, set(s.group.alerts)) for s in fake.swaps]
    assert expected == [(0, {"a1"}), (32, {"a1", "b1"}), (32, {"a1", "b1"})], expected


def a_write_whose_connection_breaks_may_have_happened():
    def cut_off(request, context):
        server.stop(None)
        time.sleep(1)

    server, client = Fake(cut_off).serve()
    with client:
        swap = pb.CompareAndSwapRequest(group=group_of("g", "a1"))
        instance = client._instance_of("g")

        failure = failure_of(
            lambda: instance.call(instance.groups.CompareAndSwap, swap), OutcomeUnknown
        )
        assert failure.reason is None, failure
        # Nothing is there any more, so nothing is sent.
        failure_of(lambda: client.store(group_of("g", "a1")), Unreachable)


def a_listing_that_was_restarted_begins_again():
    def page(token, next_token, *keys):
        def answer(request, context):
            assert request.page_token == token, request
            return pb.ListKeysResponse(keys=keys, next_page_token=next_token)

        return answer

    def restarted(request, context):
        reasoned(context, "LISTING_RESTARTED", code_pb2.ABORTED)

    fake = Fake(
        page("", "1", "deleted meanwhile"),
        restarted,
        page("", "2", "a"),
        page("2", "3"),
        page("3", "", "b", "a"),
    )
    server, client = fake.serve()
    with client:
        assert client.list_keys() == {"a", "b"}
    server.stop(None)


def a_stream_without_summary_is_read_again():
    def cut_off(request, context):
        return [pb.LoadAllResponse(groups=[group_of("deleted meanwhile", "a1")])]

    def whole(request, context):
        summary = pb.LoadAllSummary(groups=1, complete=True)
        return [
            pb.LoadAllResponse(groups=[group_of("g", "a1")]),
            pb.LoadAllResponse(summary=summary),
        ]

    server, client = Fake(cut_off, whole).serve()
    with client:
        groups, problems, summary = client.load_all()
    server.stop(None)
    assert set(groups) == {"g"} and not problems and summary.complete, groups


# While Redis answers


def replicas_change_one_group_and_no_alert_is_lost(client, targets):
    change_by_several(targets, "together")


def a_group_is_stored_loaded_and_deleted(client, targets):
    stored = client.store(group_of("one", "a1"), ttl={"seconds": 60})
    loaded = client.load("one")
    assert loaded.group.metadata.version == stored.version, loaded
    assert abs(loaded.expire_time.seconds - time.time() - 60) < 10, loaded
    assert not client.delete("one", expected_version=stored.version + 1).deleted
    assert client.delete("one").deleted
    failure = failure_of(lambda: client.load("one"), NotFound)
    assert failure.authoritative and failure.reason == "GROUP_NOT_FOUND", failure
    assert failure.metadata["backend"] == "redis" and failure.metadata["request_id"]


def a_bad_request_names_its_fields(client, targets):
    bad = group_of("bad", "a1")
    bad.alerts["a1"].labels[""] = "no name"
    failure = failure_of(lambda: client.store(bad, ttl={"nanos": 1}))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT, failure
    assert set(failure.fields) == {'group.alerts["a1"].labels', "ttl"}, failure.fields
    # A loop ends at once where another turn would not help.
    began = time.monotonic()
    failure = failure_of(lambda: client.change("bad", lambda group: None))
    assert failure.reason == "INVALID_FIELD" and time.monotonic() - began < 2, failure


def a_listing_has_every_key_whatever_the_size_of_its_pages(client, targets):
    keys = {f"page {n}" for n in range(50)}
    for key in keys:
        client.store(group_of(key, "a1"))
    assert client.list_keys(prefix="page ", page_size=7) == keys
    assert client.list_keys(prefix="page ") == keys
    assert keys < client.list_keys()


def all_groups_are_loaded_with_the_problems_and_the_summary(client, targets):
    client.store(group_of("readable", "a1"))
    groups, problems, summary = client.load_all()
    assert "readable" in groups and "unreadable" not in groups, groups
    (problem,) = problems
    assert problem.key == "unreadable", problem
    assert problem.reason == pb.ERROR_REASON_UNREADABLE_DOCUMENT, problem
    assert summary.complete and summary.problems == 1, summary
    failure = failure_of(lambda: client.load("unreadable"))
    assert failure.code == grpc.StatusCode.DATA_LOSS, failure


def both_instances_have_redis(client, targets):
    assert client.redis_health() == {target: True for target in targets}
    client.store(group_of("before the outage", "a1"))


# After Redis was killed


def memory_answers_and_says_so(client, targets):
    assert client.redis_health() == {target: False for target in targets}
    reply = client.change("during the outage", add("a1"))
    assert reply.backend == pb.BACKEND_MEMORY, reply
    assert set(client.load("during the outage").group.alerts) == {"a1"}
    client.change("before the outage", add("a2"))
    assert set(client.load("before the outage").group.alerts) == {"a1", "a2"}
    failure = failure_of(lambda: client.load("absent"), NotFound)
    assert not failure.authoritative, failure.metadata
    _, _, summary = client.load_all()
    assert not summary.complete, summary


def replicas_change_one_group_in_one_memory(client, targets):
    """Two memories, but each key belongs to one of them: no livelock."""
    for target in targets:
        keys = (f"outage {n}" for n in itertools.count())
        its_keys = (key for key in keys if rank(targets, key)[0] == target)
        change_by_several(targets, next(its_keys))


# After the first instance was killed, too


def the_next_in_rank_serves_the_keys_of_one_that_is_gone(client, targets):
    keys = [f"gone {n}" for n in range(20)]
    assert {rank(targets, key)[0] for key in keys} == set(targets)
    for key in keys:
        client.store(group_of(key, "a1"))
        client.change(key, add("a2"))
        assert set(client.load(key).group.alerts) == {"a1", "a2"}
    assert client.redis_health() == {targets[1]: False}


STORIES = {
    "alone": [
        everything_is_typed,
        ranks_are_those_of_other_languages,
        a_change_of_unknown_outcome_is_applied_to_what_is_stored,
        a_write_whose_connection_breaks_may_have_happened,
        a_listing_that_was_restarted_begins_again,
        a_stream_without_summary_is_read_again,
    ],
    "redis": [
        replicas_change_one_group_and_no_alert_is_lost,
        a_group_is_stored_loaded_and_deleted,
        a_bad_request_names_its_fields,
        a_listing_has_every_key_whatever_the_size_of_its_pages,
        all_groups_are_loaded_with_the_problems_and_the_summary,
        both_instances_have_redis,
    ],
    "down": [
        memory_answers_and_says_so,
        replicas_change_one_group_in_one_memory,
    ],
    "gone": [
        the_next_in_rank_serves_the_keys_of_one_that_is_gone,
    ],
}


def main(phase, *targets):
    for story in STORIES[phase]:
        print(story.__name__, flush=True)
        if targets:
            with Client(targets) as client:
                story(client, list(targets))
        else:
            story()
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
