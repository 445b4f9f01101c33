// The adapter against real instances of groupstate:
//
//	GROUPSTATE_TARGETS=127.0.0.1:50051,127.0.0.1:50052 go test -run 'TestOnRedis|TestRank'
//
// tests/clients/examples.rs starts the instances and their Redis, kills one or the
// other, and runs the test of each phase.

package groupstate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

var ctx = context.Background()

func TestRankIsThatOfOtherLanguages(t *testing.T) {
	file, err := os.ReadFile("../../tests/data/rendezvous-vectors.json")
	must(t, err)
	var vectors []struct {
		Addresses []string
		Key       string
		Ranking   []string
	}
	must(t, json.Unmarshal(file, &vectors))
	if len(vectors) < 10 {
		t.Fatalf("only %d vectors", len(vectors))
	}
	for _, vector := range vectors {
		rank(vector.Addresses, vector.Key)
		if !reflect.DeepEqual(vector.Addresses, vector.Ranking) {
			t.Errorf("%q: %v, not %v", vector.Key, vector.Addresses, vector.Ranking)
		}
	}
}

// === While Redis answers; a document under "unreadable" is none ===

func TestOnRedis(t *testing.T) {
	storage := newStorage(t)

	t.Run("a group is created once, and its version is written back", func(t *testing.T) {
		first, second := newGroup("create"), newGroup("create")
		must(t, storage.Store(ctx, first))
		if first.Version == 0 || first.Metadata.Version != first.Version {
			t.Fatalf("no version: %+v", first)
		}
		mismatch := wantMismatch(t, storage.Store(ctx, second))
		if mismatch.ExpectedVersion != 0 || mismatch.ActualVersion != first.Version {
			t.Fatal(mismatch)
		}
		if second.Version != 0 {
			t.Fatal("a lost race must leave the version as it was")
		}
	})

	t.Run("an alert without a time of receipt was received when it is stored first", func(t *testing.T) {
		group, began := newGroup("stamp"), time.Now()
		report := *group.Alerts["a1"]
		report.Timestamp = &report.StartsAt // as the service writes it
		shared := map[string]*Alert{"a1": &report, "a2": {Fingerprint: "a2", Status: "firing"}}
		group.Alerts = map[string]*Alert{"a1": shared["a1"], "a2": shared["a2"]}
		must(t, storage.Store(ctx, group))
		loaded, err := storage.Load(ctx, "stamp")
		must(t, err)
		for fingerprint, alert := range loaded.Alerts {
			if alert.Timestamp == nil || alert.Timestamp.Before(began) {
				t.Fatalf("%s: %v", fingerprint, alert.Timestamp)
			}
		}
		if shared["a2"].Timestamp != nil {
			t.Fatal("an alert that others may hold was changed")
		}
		first := *loaded.Alerts["a1"].Timestamp
		_, err = storage.Change(ctx, "stamp", func(group *AlertGroup) error {
			group.Alerts["a2"] = &Alert{Fingerprint: "a2", Status: "resolved"}
			return nil
		})
		must(t, err)
		loaded, err = storage.Load(ctx, "stamp")
		must(t, err)
		if !loaded.Alerts["a1"].Timestamp.Equal(first) || !loaded.Alerts["a2"].Timestamp.After(first) {
			t.Fatalf("%v, then %+v", first, loaded.Alerts)
		}
	})

	t.Run("a count beyond what the API has is its greatest", func(t *testing.T) {
		group := newGroup("counts")
		group.Metadata.FiringCount, group.Metadata.GroupWaitTimer.ResetCount = 1<<40, 1<<33
		must(t, storage.Store(ctx, group))
		loaded, err := storage.Load(ctx, "counts")
		must(t, err)
		if loaded.Metadata.FiringCount != math.MaxInt32 || loaded.Metadata.GroupWaitTimer.ResetCount != math.MaxInt32 {
			t.Fatalf("%+v", loaded.Metadata)
		}
	})

	t.Run("what was stored is loaded, every field", func(t *testing.T) {
		stored := newGroup("fields")
		must(t, storage.Store(ctx, stored))
		loaded, err := storage.Load(ctx, "fields")
		must(t, err)
		if !reflect.DeepEqual(loaded, stored) {
			t.Fatalf("%+v %+v\nis not\n%+v %+v", loaded, loaded.Metadata, stored, stored.Metadata)
		}
	})

	t.Run("of two that loaded one version, one loses and stores nothing", func(t *testing.T) {
		must(t, storage.Store(ctx, newGroup("race")))
		ours, err := storage.Load(ctx, "race")
		must(t, err)
		theirs, err := storage.Load(ctx, "race")
		must(t, err)
		expected := ours.Version
		theirs.Metadata.State = "resolved"
		must(t, storage.Store(ctx, theirs))
		ours.Metadata.State = "silenced"
		mismatch := wantMismatch(t, storage.Store(ctx, ours))
		want := ErrVersionMismatch{Key: "race", ExpectedVersion: expected, ActualVersion: theirs.Version}
		if *mismatch != want {
			t.Fatalf("%+v", mismatch)
		}
		loaded, err := storage.Load(ctx, "race")
		must(t, err)
		if loaded.Metadata.State != "resolved" {
			t.Fatal(loaded.Metadata.State)
		}
	})

	t.Run("a group that is gone is a mismatch that says so", func(t *testing.T) {
		group := newGroup("gone")
		must(t, storage.Store(ctx, group))
		must(t, storage.Delete(ctx, "gone"))
		mismatch := wantMismatch(t, storage.Store(ctx, group))
		if mismatch.ActualVersion != 0 {
			t.Fatal(mismatch)
		}
		group.Version = 0
		must(t, storage.Store(ctx, group))
	})

	// The trap of the service's own Clone: every save of a copy was a lost race.
	t.Run("a copy has the version and can be stored", func(t *testing.T) {
		group := newGroup("copy")
		must(t, storage.Store(ctx, group))
		loaded, err := storage.Load(ctx, "copy")
		must(t, err)
		copied := loaded.Clone()
		copied.Metadata.State = "resolved"
		must(t, storage.Store(ctx, copied))
		if loaded.Metadata.State != "firing" || copied.Version <= loaded.Version {
			t.Fatalf("%+v %+v", loaded, copied)
		}
	})

	t.Run("three replicas change one group and no alert is lost", func(t *testing.T) {
		changeBySeveral(t, "replicas")
	})

	t.Run("a change is not made if its function fails", func(t *testing.T) {
		refused := errors.New("not today")
		_, err := storage.Change(ctx, "never", func(*AlertGroup) error { return refused })
		if err != refused {
			t.Fatal(err)
		}
		wantNotFound(t, storage, "never", true)
	})

	t.Run("an absent group is not found, and deleting it is no error", func(t *testing.T) {
		wantNotFound(t, storage, "absent", true)
		must(t, storage.Delete(ctx, "absent"))
	})

	t.Run("a group expires", func(t *testing.T) {
		brief, err := NewStorage(Config{Targets: targets(t), TTL: time.Second, DialOptions: insecure})
		must(t, err)
		defer brief.Close()
		must(t, brief.Store(ctx, newGroup("brief 1")))
		must(t, brief.StoreAll(ctx, []*AlertGroup{newGroup("brief 2")}))
		time.Sleep(1200 * time.Millisecond)
		wantNotFound(t, storage, "brief 1", true)
		wantNotFound(t, storage, "brief 2", true)
	})

	t.Run("a bad group is refused by the names of its fields", func(t *testing.T) {
		group := newGroup("bad")
		group.Metadata.State = "burning"
		group.Alerts["nil"] = nil
		var failure *StorageError
		if err := storage.Store(ctx, group); !errors.As(err, &failure) || Reason(err) != "INVALID_FIELD" ||
			!strings.Contains(err.Error(), "group.metadata.state") ||
			!strings.Contains(err.Error(), `group.alerts["nil"]`) {
			t.Fatal(err)
		}
		group = newGroup("bad")
		group.Alerts["a1"].Labels["summary"] = "\xff"
		var unknown *OutcomeUnknownError
		if err := storage.Store(ctx, group); !errors.As(err, &failure) || errors.As(err, &unknown) {
			t.Fatal(err)
		}
		if err := storage.Store(ctx, nil); !errors.As(err, &failure) {
			t.Fatal(err)
		}
		wantNotFound(t, storage, "bad", true)
	})

	t.Run("many groups are stored, listed, counted and loaded; those that cannot be are named", func(t *testing.T) {
		const many = 1200 // more than a page, and than a batch
		before, err := storage.Size(ctx)
		must(t, err)
		groups := make([]*AlertGroup, many)
		for n := range groups {
			groups[n] = newGroup(GroupKey(fmt.Sprintf("many %d", n)))
		}
		refused, notText := newGroup("refused"), newGroup("not text")
		refused.Metadata = nil
		notText.Alerts["a1"].AlertName = "\xff"
		partial := wantPartial(t, storage.StoreAll(ctx, append(groups, refused, notText)))
		if keys := problemKeys(partial); keys != "not text INVALID_FIELD, refused INVALID_FIELD" {
			t.Fatal(keys)
		}
		if partial.Problems[0].Code != codes.InvalidArgument || partial.Incomplete {
			t.Fatalf("%+v", partial)
		}

		stored := map[GroupKey]int64{}
		for _, group := range groups {
			stored[group.Key] = group.Version
		}
		keys, err := storage.ListKeys(ctx)
		must(t, err)
		if counted := countMany(keys); counted != many {
			t.Fatalf("%d keys", counted)
		}
		size, err := storage.Size(ctx)
		must(t, err)
		if size != before+many {
			t.Fatalf("%d groups, %d before", size, before)
		}

		// One unreadable document does not keep a replica from starting.
		var told *PartialError
		storage.onPartial = func(partial *PartialError) { told = partial }
		all, err := storage.LoadAll(ctx)
		must(t, err)
		if keys := problemKeys(told); keys != "unreadable UNREADABLE_DOCUMENT" {
			t.Fatal(keys)
		}
		_, partial, err = storage.Restore(ctx)
		must(t, err)
		if keys := problemKeys(partial); keys != "unreadable UNREADABLE_DOCUMENT" {
			t.Fatal(keys)
		}
		for _, group := range all {
			if version, ours := stored[group.Key]; ours && version == group.Version {
				delete(stored, group.Key)
			}
		}
		if len(stored) != 0 || len(all) != size-1 {
			t.Fatalf("%d groups loaded of %d, not as stored: %v", len(all), size, stored)
		}

		first, later := newGroup("twice"), newGroup("twice")
		later.Metadata.State = "resolved"
		must(t, storage.StoreAll(ctx, []*AlertGroup{first, nil, later}))
		loaded, err := storage.Load(ctx, "twice")
		must(t, err)
		if loaded.Metadata.State != "resolved" || loaded.Version != later.Version {
			t.Fatalf("%+v", loaded)
		}
	})

	t.Run("an unreadable group is an error and no absent one", func(t *testing.T) {
		var failure *StorageError
		if _, err := storage.Load(ctx, "unreadable"); !errors.As(err, &failure) || Reason(err) != "UNREADABLE_DOCUMENT" {
			t.Fatal(err)
		}
		_, err := storage.Change(ctx, "unreadable", func(*AlertGroup) error { return nil })
		if Reason(err) != "UNREADABLE_DOCUMENT" {
			t.Fatal(err)
		}
	})

	t.Run("redis answers", func(t *testing.T) {
		must(t, storage.Ping(ctx))
	})

	must(t, storage.Store(ctx, newGroup("before the outage")))
}

// === After Redis was killed ===

func TestRedisDown(t *testing.T) {
	storage := newStorage(t)

	if err := storage.Ping(ctx); err == nil || !strings.Contains(err.Error(), "memory") {
		t.Fatal(err)
	}

	group := newGroup("during the outage")
	must(t, storage.Store(ctx, group))
	group.Metadata.State = "resolved"
	must(t, storage.Store(ctx, group))
	loaded, err := storage.Load(ctx, group.Key)
	must(t, err)
	if loaded.Version != group.Version || loaded.Metadata.State != "resolved" {
		t.Fatalf("%+v", loaded)
	}
	wantMismatch(t, storage.Store(ctx, newGroup(group.Key)))

	known, err := storage.Load(ctx, "before the outage")
	must(t, err)
	must(t, storage.Store(ctx, known))

	// The memory of one instance cannot know that nobody has it.
	wantNotFound(t, storage, "absent", false)

	all, partial, err := storage.Restore(ctx)
	must(t, err)
	if partial == nil || !partial.Incomplete {
		t.Fatal(partial)
	}
	if len(all) == 0 {
		t.Fatal("what memory knows must be returned")
	}

	// Two memories, but each key belongs to one of them: no livelock.
	for _, target := range targets(t) {
		key := GroupKey("outage")
		for storage.instances.ranked(key)[0].address != target {
			key += "!"
		}
		changeBySeveral(t, key)
	}
}

// === After the first of the instances was killed, too ===

func TestInstanceGone(t *testing.T) {
	storage := newStorage(t)
	dead, changed := targets(t)[0], 0
	for n := 0; n < 20; n++ {
		key := GroupKey(fmt.Sprintf("gone %d", n))
		if storage.instances.ranked(key)[0].address == dead {
			changed++
		}
		must(t, storage.Store(ctx, newGroup(key)))
		_, err := storage.Load(ctx, key)
		must(t, err)
	}
	if changed == 0 || changed == 20 {
		t.Fatalf("of 20 keys %d belonged to the instance that is gone", changed)
	}
	changeBySeveral(t, "gone together")
}

// === Helpers ===

var insecure = []grpc.DialOption{grpc.WithInsecure()}

func targets(t *testing.T) []string {
	targets := os.Getenv("GROUPSTATE_TARGETS")
	if targets == "" {
		t.Fatal("set GROUPSTATE_TARGETS to the HOST:PORT of running instances, joined by commas")
	}
	return strings.Split(targets, ",")
}

func newStorage(t *testing.T) *Storage {
	storage, err := NewStorage(Config{Targets: targets(t), DialOptions: insecure})
	must(t, err)
	t.Cleanup(storage.Close)
	return storage
}

// changeBySeveral lets three replicas add ten alerts each to one group, one after the
// other, but all three at once.
func changeBySeveral(t *testing.T, key GroupKey) {
	const replicas, alerts = 3, 10
	var all sync.WaitGroup
	for replica := 0; replica < replicas; replica++ {
		storage, name := newStorage(t), replica
		all.Add(1)
		go func() {
			defer all.Done()
			for n := 0; n < alerts; n++ {
				fingerprint := fmt.Sprintf("%d-%d", name, n)
				_, err := storage.Change(ctx, key, func(group *AlertGroup) error {
					group.Alerts[fingerprint] = &Alert{Fingerprint: fingerprint, Status: "firing"}
					group.Metadata.State = "firing"
					group.Metadata.FiringCount = len(group.Alerts)
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		}()
	}
	all.Wait()
	group, err := newStorage(t).Load(ctx, key)
	must(t, err)
	if len(group.Alerts) != replicas*alerts || group.Metadata.FiringCount != replicas*alerts {
		t.Fatalf("%s has %d alerts, and counts %d", key, len(group.Alerts), group.Metadata.FiringCount)
	}
}

// newGroup has every field set, and times as precise as they get.
func newGroup(key GroupKey) *AlertGroup {
	moment := time.Date(2026, 11, 23, 5, 28, 3, 123456789, time.UTC)
	later := moment.Add(time.Minute)
	link := "http://prometheus.example/graph?g0.expr=up"
	timer := func(id string) *TimerMetadata {
		return &TimerMetadata{Version: 7, CreatedBy: "replica-1", ResetCount: 2, LastResetAt: &later, LockID: id}
	}
	return &AlertGroup{
		Key: key,
		Alerts: map[string]*Alert{"a1": {
			Fingerprint:  "a1",
			AlertName:    "HighCPU",
			Status:       "firing",
			Labels:       map[string]string{"alertname": "HighCPU"},
			Annotations:  map[string]string{"summary": "CPU is \"high\" <80%> & rising"},
			StartsAt:     moment,
			EndsAt:       &later,
			GeneratorURL: &link,
			Timestamp:    &later,
		}},
		Metadata: &GroupMetadata{
			State:               "firing",
			CreatedAt:           moment,
			UpdatedAt:           later,
			FirstFiringAt:       &moment,
			ResolvedAt:          &later,
			FiringCount:         1,
			ResolvedCount:       2,
			GroupBy:             []string{"alertname"},
			GroupWaitTimer:      timer("wait"),
			GroupIntervalTimer:  timer("interval"),
			RepeatIntervalTimer: timer("repeat"),
		},
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantMismatch(t *testing.T, err error) *ErrVersionMismatch {
	t.Helper()
	var mismatch *ErrVersionMismatch
	if !errors.As(err, &mismatch) {
		t.Fatalf("no version mismatch: %v", err)
	}
	return mismatch
}

func wantPartial(t *testing.T, err error) *PartialError {
	t.Helper()
	var partial *PartialError
	if !errors.As(err, &partial) {
		t.Fatalf("not partial: %v", err)
	}
	return partial
}

func wantNotFound(t *testing.T, storage *Storage, key GroupKey, authoritative bool) {
	t.Helper()
	group, err := storage.Load(ctx, key)
	var notFound *GroupNotFoundError
	var inMemory *NotAuthoritativeError
	if !errors.As(err, &notFound) || notFound.Key != key || errors.As(err, &inMemory) == authoritative {
		t.Fatalf("%v, %#v", group, err)
	}
}

func problemKeys(partial *PartialError) string {
	var keys []string
	for _, problem := range partial.Problems {
		keys = append(keys, string(problem.Key)+" "+problem.Reason)
	}
	sort.Strings(keys)
	return strings.Join(keys, ", ")
}

func countMany(keys []GroupKey) int {
	many := map[GroupKey]bool{}
	for _, key := range keys {
		if strings.HasPrefix(string(key), "many ") {
			many[key] = true
		}
	}
	return len(many)
}
