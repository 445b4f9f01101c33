"""What a replica does with groups, told as a story. Start the service, then:

    python examples/python/example.py localhost:50051

It takes several `HOST:PORT`, too. The client is the package in `clients/python`.
"""

import sys
import threading
import time

from groupstate import Client, Failure, NotFound, pb

KEY = "alertname=DiskFull,cluster=python"


def alert(fingerprint, status, minutes_ago):
    """A report of an alert, received so many minutes ago."""
    now = int(time.time())
    return pb.Alert(
        fingerprint=fingerprint,
        alert_name="DiskFull",
        status=status,
        labels={"alertname": "DiskFull", "cluster": "python", "disk": fingerprint},
        starts_at={"seconds": now - 3_600},
        timestamp={"seconds": now - 60 * minutes_ago},
    )


def report(alert):
    """The change "this alert was reported", to be applied to any state of its group.

    A lost race applies a report again over later ones: so the one that was received
    last counts, not the one that is applied last. When an alert began does not count
    first: the start of a running one moves backwards when Alertmanager hears of a
    second Prometheus that fired earlier."""

    def order(alert):
        def moment(name):
            time = getattr(alert, name)
            return (time.seconds, time.nanos) if alert.HasField(name) else ()

        received = moment("timestamp")
        happened = () if received else moment("ends_at") or moment("starts_at")
        # Of two at the same time, resolved over firing.
        return received, happened, alert.status, moment("starts_at")

    def apply(group):
        known = group.alerts.get(alert.fingerprint)
        if known is None or order(known) <= order(alert):
            group.alerts[alert.fingerprint].CopyFrom(alert)
        # The service stores what it is told. Counts and state are up to us.
        states = [a.status for a in group.alerts.values()]
        group.metadata.firing_count = states.count(pb.ALERT_STATUS_FIRING)
        group.metadata.resolved_count = states.count(pb.ALERT_STATUS_RESOLVED)
        if group.metadata.state != pb.GROUP_STATE_SILENCED:
            if group.metadata.resolved_count == 0:
                group.metadata.state = pb.GROUP_STATE_FIRING
            elif group.metadata.firing_count == 0:
                group.metadata.state = pb.GROUP_STATE_RESOLVED
            else:
                group.metadata.state = pb.GROUP_STATE_MIXED

    return apply


def main(targets):
    with Client(targets) as client:
        # Ten replicas, one group, the same moment: no alert is lost.
        replicas = [
            threading.Thread(
                target=client.change,
                args=(KEY, report(alert(f"disk-{n}", pb.ALERT_STATUS_FIRING, 10))),
            )
            for n in range(10)
        ]
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.join()
        loaded = client.load(KEY)
        print("alerts:", len(loaded.group.alerts))

        # A later report of one of them, and an earlier one that is applied late.
        client.change(KEY, report(alert("disk-1", pb.ALERT_STATUS_RESOLVED, 1)))
        client.change(KEY, report(alert("disk-1", pb.ALERT_STATUS_FIRING, 5)))
        metadata = client.load(KEY).group.metadata
        print("firing:", metadata.firing_count, "resolved:", metadata.resolved_count)
        print("state:", pb.GroupState.Name(metadata.state))

        # An error says what is wrong with which field.
        try:
            client.store(pb.AlertGroup(key="\n"), ttl={"seconds": -1})
        except Failure as failure:
            print("refused:", failure.reason, *sorted(failure.fields))

        # After a restart: all groups, and what could not be read.
        groups, problems, summary = client.load_all(prefix=KEY)
        for problem in problems:
            print("cannot be read:", problem.key, problem.message)
        print("groups:", len(groups), "of", len(client.list_keys(prefix=KEY)), "keys")
        if not summary.complete:
            print("Redis is down: there may be more")

        client.delete(KEY)
        try:
            client.load(KEY)
        except NotFound as failure:
            print("deleted:", failure.reason)


if __name__ == "__main__":
    main(sys.argv[1:])
