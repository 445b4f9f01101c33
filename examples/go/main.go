// What a replica does with groups, told as a story. Start the service, then:
//
//	go run . localhost:50051
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	groupstate "github.com/groupstate/groupstate/clients/go"
)

const key = groupstate.GroupKey("alertname=DiskFull,cluster=go")

// report is the change "this alert was reported", to be applied to any state of its
// group. A lost race applies a report again over later ones: so the one that was
// received last counts, not the one that is applied last.
func report(alert *groupstate.Alert) func(*groupstate.AlertGroup) error {
	return func(group *groupstate.AlertGroup) error {
		if known := group.Alerts[alert.Fingerprint]; known == nil || !isLater(known, alert) {
			group.Alerts[alert.Fingerprint] = alert
		}
		// The service stores what it is told. Counts and state are up to us.
		m := group.Metadata
		m.FiringCount, m.ResolvedCount = 0, 0
		for _, alert := range group.Alerts {
			if alert.Status == "firing" {
				m.FiringCount++
			} else {
				m.ResolvedCount++
			}
		}
		switch {
		case m.State == "silenced":
		case m.ResolvedCount == 0:
			m.State = "firing"
		case m.FiringCount == 0:
			m.State = "resolved"
		default:
			m.State = "mixed"
		}
		return nil
	}
}

// isLater orders the reports of one alert: by Timestamp, when each was received;
// resolved over firing; then by StartsAt. One without a Timestamp comes before all
// that have one; of two without, the later EndsAt counts, or StartsAt.
//
// StartsAt does not decide first: that of a running alert moves backwards when
// Alertmanager hears of a second Prometheus that fired earlier.
func isLater(a, b *groupstate.Alert) bool {
	if (a.Timestamp == nil) != (b.Timestamp == nil) {
		return b.Timestamp == nil
	}
	if at, bt := received(a), received(b); !at.Equal(bt) {
		return at.After(bt)
	}
	if a.Status != b.Status {
		return a.Status == "resolved"
	}
	return a.StartsAt.After(b.StartsAt)
}

func received(alert *groupstate.Alert) time.Time {
	switch {
	case alert.Timestamp != nil:
		return *alert.Timestamp
	case alert.EndsAt != nil:
		return *alert.EndsAt
	default:
		return alert.StartsAt
	}
}

// alert is a report of an alert, received so many minutes ago.
func alert(fingerprint string, status groupstate.AlertStatus, minutesAgo time.Duration) *groupstate.Alert {
	now := time.Now()
	timestamp := now.Add(-minutesAgo * time.Minute)
	return &groupstate.Alert{
		Fingerprint: fingerprint,
		AlertName:   "DiskFull",
		Status:      status,
		Labels:      map[string]string{"alertname": "DiskFull", "cluster": "go", "disk": fingerprint},
		StartsAt:    now.Add(-time.Hour),
		Timestamp:   &timestamp,
	}
}

func main() {
	ctx := context.Background()
	storage, err := groupstate.NewStorage(groupstate.Config{
		Targets: os.Args[1:],
		// Since grpc 1.34: grpc.WithTransportCredentials(insecure.NewCredentials()).
		DialOptions: []grpc.DialOption{grpc.WithInsecure()},
	})
	must(err)
	defer storage.Close()

	// Ten replicas, one group, the same moment: no alert is lost.
	var replicas sync.WaitGroup
	for n := 0; n < 10; n++ {
		replicas.Add(1)
		go func(n int) {
			defer replicas.Done()
			_, err := storage.Change(ctx, key, report(alert(fmt.Sprintf("disk-%d", n), "firing", 10)))
			must(err)
		}(n)
	}
	replicas.Wait()
	group, err := storage.Load(ctx, key)
	must(err)
	fmt.Println("alerts:", len(group.Alerts))

	// Two have loaded the same version, and only one of them can store it.
	ours, theirs := group, group.Clone()
	must(report(alert("disk-1", "resolved", 1))(theirs))
	must(storage.Store(ctx, theirs))
	must(report(alert("disk-2", "resolved", 1))(ours))
	var mismatch *groupstate.ErrVersionMismatch
	if err := storage.Store(ctx, ours); !errors.As(err, &mismatch) {
		log.Fatalf("should have lost the race: %v", err)
	}
	fmt.Println("lost race:", mismatch.ActualVersion == theirs.Version)

	// The change once more, on what is stored now.
	group, err = storage.Change(ctx, key, report(alert("disk-2", "resolved", 1)))
	must(err)
	fmt.Println("state:", group.Metadata.State, "with", group.Metadata.ResolvedCount, "resolved")

	// After a restart: all groups, and what could not be read.
	groups, partial, err := storage.Restore(ctx)
	must(err)
	for _, group := range groups {
		if strings.HasSuffix(string(group.Key), ",cluster=go") {
			fmt.Println("restored:", group.Key)
		}
	}
	if partial != nil {
		fmt.Println("not all of them:", partial)
	}

	must(storage.Delete(ctx, key))
	_, err = storage.Load(ctx, key)
	fmt.Println("deleted:", err)
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
