"""What a replica does with groups, told as a story. Start the service, then:

    python examples/python/example.py localhost:50051

It takes several `HOST:PORT`, too. `groupstate_client.py` is the client.
"""

import sys
import threading

from groupstate_client import Client, Failure, NotFound, pb

KEY = "alertname=DiskFull,cluster=python"


def alert(fingerprint, status, starts_at):
    return pb.Alert(
        fingerprint=fingerprint,
        alert_name="DiskFull",
        status=status,
        labels={"alertname": "DiskFull", "cluster": "python", "disk": fingerprint},
        starts_at={"seconds": starts_at},
    )


def report(alert):
    """The change "this alert was reported", to be applied to any state of its group.

    Reports come in any order, and a lost race applies one again over later ones: so
    the later report of an alert counts, not the one that is applied last."""

    def order(alert):
        times = [(t.seconds, t.nanos) for t in (alert.starts_at, alert.timestamp)]
        return times, alert.status  # of two at the same time, resolved over firing

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
                args=(KEY, report(alert(f"disk-{n}", pb.ALERT_STATUS_FIRING, 1_000))),
            )
            for n in range(10)
        ]
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.join()
        loaded = client.load(KEY)
        print("alerts:", len(loaded.group.alerts))

        # A later report of one of them, and an earlier one that is late.
        client.change(KEY, report(alert("disk-1", pb.ALERT_STATUS_RESOLVED, 2_000)))
        client.change(KEY, report(alert("disk-1", pb.ALERT_STATUS_FIRING, 1_500)))
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
