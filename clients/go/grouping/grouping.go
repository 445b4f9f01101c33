// Package grouping stands for the packages grouping and core of the Go alert-history
// service: the interface GroupStorage with its types and errors, written from the
// contract. The adapter is compiled and tested against it; in the service it is not copied.
package grouping

import (
	"context"
	"fmt"
	"time"
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

// Clone copies a group; the alerts are shared. The service's own forgets Version.
func (g *AlertGroup) Clone() *AlertGroup {
	alerts := make(map[string]*Alert, len(g.Alerts))
	for fingerprint, alert := range g.Alerts {
		alerts[fingerprint] = alert
	}
	metadata := *g.Metadata
	return &AlertGroup{Key: g.Key, Alerts: alerts, Metadata: &metadata, Version: g.Version}
}

// GroupNotFoundError says that there is no such group, or that it has expired.
type GroupNotFoundError struct {
	Key GroupKey
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
