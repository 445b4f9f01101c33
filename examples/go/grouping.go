// The types of the Go alert-history service, in as many lines as the adapter
// needs. In the service itself this file is not copied: it has all of them in its
// packages grouping and core, and only what is marked NEW is to be added there.

package grouping

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
)

// GroupStorage is what the service asks of a store of groups.
type GroupStorage interface {
	Store(ctx context.Context, group *AlertGroup) error
	Load(ctx context.Context, groupKey GroupKey) (*AlertGroup, error)
	Delete(ctx context.Context, groupKey GroupKey) error
	ListKeys(ctx context.Context) ([]GroupKey, error)
	Size(ctx context.Context) (int, error)
	LoadAll(ctx context.Context) ([]*AlertGroup, error)
	StoreAll(ctx context.Context, groups []*AlertGroup) error
	Ping(ctx context.Context) error
}

// GroupKey is the name of a group, such as "alertname=HighCPU,cluster=prod".
type GroupKey string

// AlertGroup is a group of alerts by fingerprint.
type AlertGroup struct {
	Key      GroupKey
	Alerts   map[string]*Alert
	Metadata *GroupMetadata
	// Version that was loaded or stored; 0 for a group that is new.
	Version int64
}

// GroupState is "firing", "resolved", "mixed" or "silenced".
type GroupState string

// GroupMetadata is what is known of a group besides its alerts.
type GroupMetadata struct {
	State               GroupState
	CreatedAt           time.Time
	UpdatedAt           time.Time
	FirstFiringAt       *time.Time
	ResolvedAt          *time.Time
	FiringCount         int
	ResolvedCount       int
	GroupBy             []string
	GroupWaitTimer      *TimerMetadata
	GroupIntervalTimer  *TimerMetadata
	RepeatIntervalTimer *TimerMetadata
	Version             int64
}

// TimerMetadata is a timer that the service keeps with a group.
type TimerMetadata struct {
	Version     int64
	CreatedBy   string
	ResetCount  int
	LastResetAt *time.Time
	LockID      string
}

// AlertStatus is "firing" or "resolved".
type AlertStatus string

// Alert is one alert of a group.
type Alert struct {
	Fingerprint  string
	AlertName    string
	Status       AlertStatus
	Labels       map[string]string
	Annotations  map[string]string
	StartsAt     time.Time
	EndsAt       *time.Time
	GeneratorURL *string
	Timestamp    *time.Time
}

// Clone copies a group; the alerts are shared.
func (g *AlertGroup) Clone() *AlertGroup {
	alerts := make(map[string]*Alert, len(g.Alerts))
	for fingerprint, alert := range g.Alerts {
		alerts[fingerprint] = alert
	}
	metadata := *g.Metadata
	// NEW: Version is copied. A copy without it could never be stored, since every
	// Store would be an attempt to create a group that is there.
	return &AlertGroup{Key: g.Key, Alerts: alerts, Metadata: &metadata, Version: g.Version}
}

// GroupNotFoundError says that there is no such group, or that it has expired.
type GroupNotFoundError struct {
	Key GroupKey
	// NEW: false if the memory of one instance has answered, because Redis is down.
	// It cannot know what others hold, so who has seen the group must not forget it.
	Authoritative bool
}

func (e *GroupNotFoundError) Error() string {
	return fmt.Sprintf("group not found: %s", e.Key)
}

// ErrVersionMismatch says that a group was not stored, as another version is there.
type ErrVersionMismatch struct {
	Key             GroupKey
	ExpectedVersion int64
	// 0 if there is no such group any more.
	ActualVersion int64
}

func (e *ErrVersionMismatch) Error() string {
	if e.ActualVersion == 0 {
		return fmt.Sprintf("version mismatch for group %s: expected version %d, but the group is gone "+
			"(deleted or expired); at version 0 it would be created anew", e.Key, e.ExpectedVersion)
	}
	return fmt.Sprintf("version mismatch for group %s: expected version %d, found %d",
		e.Key, e.ExpectedVersion, e.ActualVersion)
}

// StorageError says that the store refuses a call, and surely has not done what it
// asked for; or that it could not read.
type StorageError struct {
	Operation string
	Err       error
}

func (e *StorageError) Error() string {
	return fmt.Sprintf("storage error during %s: %v", e.Operation, e.Err)
}

func (e *StorageError) Unwrap() error { return e.Err }

// OutcomeUnknownError (NEW) says that it cannot be told whether a write happened: its
// answer was lost on the way from Redis, or on the way to us. Load the group and
// apply the change again: if the write has happened, to store the group once more is
// a lost race.
type OutcomeUnknownError struct {
	Operation string
	Key       GroupKey
	Err       error
}

func (e *OutcomeUnknownError) Error() string {
	return fmt.Sprintf("it is unknown whether %s of group %s has happened: load it and apply the change again: %v",
		e.Operation, e.Key, e.Err)
}

func (e *OutcomeUnknownError) Unwrap() error { return e.Err }

// PartialError (NEW) says that a LoadAll or StoreAll was not the whole of it.
type PartialError struct {
	Operation string
	// The groups that could not be read or stored, each with its reason.
	Problems []Problem
	// Memory has answered a LoadAll in place of Redis, and cannot know every group.
	Incomplete bool
}

// Problem (NEW) is what went wrong with one group of many.
type Problem struct {
	Key  GroupKey
	Code codes.Code
	// A name of ErrorReason in the proto. If it is empty or OUTCOME_UNKNOWN, the group
	// may or may not have been stored.
	Reason  string
	Message string
}

func (e *PartialError) Error() string {
	text := fmt.Sprintf("%s: %d groups failed", e.Operation, len(e.Problems))
	if len(e.Problems) > 0 {
		first := e.Problems[0]
		text += fmt.Sprintf(", the first one is %s: %s %s", first.Key, first.Reason, first.Message)
	}
	if e.Incomplete {
		text += "; Redis is down and there may be more groups than the ones in memory"
	}
	return text
}
