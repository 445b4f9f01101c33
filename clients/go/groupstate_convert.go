// Groups of the service as messages of the API, and back.

package groupstate

import (
	"fmt"
	"math"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/groupstate/groupstate/clients/go/groupstatev1"
)

// The names of the API's enums are those of the service with a prefix. A name that
// the API does not know becomes "unspecified", which it refuses by the field's name.
const (
	statePrefix  = "GROUP_STATE_"
	statusPrefix = "ALERT_STATUS_"
)

func nameOf(value fmt.Stringer, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(value.String(), prefix))
}

func groupToProto(g *AlertGroup) *pb.AlertGroup {
	group := &pb.AlertGroup{Key: string(g.Key), Alerts: make(map[string]*pb.Alert, len(g.Alerts))}
	for fingerprint, alert := range g.Alerts {
		group.Alerts[fingerprint] = alertToProto(alert)
	}
	if m := g.Metadata; m != nil {
		group.Metadata = &pb.GroupMetadata{
			State:               pb.GroupState(pb.GroupState_value[statePrefix+strings.ToUpper(string(m.State))]),
			CreatedAt:           timeToProto(&m.CreatedAt),
			UpdatedAt:           timeToProto(&m.UpdatedAt),
			FirstFiringAt:       timeToProto(m.FirstFiringAt),
			ResolvedAt:          timeToProto(m.ResolvedAt),
			FiringCount:         count(m.FiringCount),
			ResolvedCount:       count(m.ResolvedCount),
			GroupBy:             m.GroupBy,
			GroupWaitTimer:      timerToProto(m.GroupWaitTimer),
			GroupIntervalTimer:  timerToProto(m.GroupIntervalTimer),
			RepeatIntervalTimer: timerToProto(m.RepeatIntervalTimer),
			Version:             g.Version,
		}
	}
	return group
}

func groupFromProto(group *pb.AlertGroup) *AlertGroup {
	g := &AlertGroup{Key: GroupKey(group.Key), Alerts: make(map[string]*Alert, len(group.Alerts))}
	for fingerprint, alert := range group.Alerts {
		g.Alerts[fingerprint] = alertFromProto(alert)
	}
	if m := group.Metadata; m != nil {
		g.Version = m.Version
		g.Metadata = &GroupMetadata{
			State:               GroupState(nameOf(m.State, statePrefix)),
			CreatedAt:           timeOrZero(m.CreatedAt),
			UpdatedAt:           timeOrZero(m.UpdatedAt),
			FirstFiringAt:       timeFromProto(m.FirstFiringAt),
			ResolvedAt:          timeFromProto(m.ResolvedAt),
			FiringCount:         int(m.FiringCount),
			ResolvedCount:       int(m.ResolvedCount),
			GroupBy:             m.GroupBy,
			GroupWaitTimer:      timerFromProto(m.GroupWaitTimer),
			GroupIntervalTimer:  timerFromProto(m.GroupIntervalTimer),
			RepeatIntervalTimer: timerFromProto(m.RepeatIntervalTimer),
			Version:             m.Version,
		}
	}
	return g
}

func alertToProto(a *Alert) *pb.Alert {
	if a == nil {
		return &pb.Alert{} // refused, by name
	}
	alert := &pb.Alert{
		Fingerprint: a.Fingerprint,
		AlertName:   a.AlertName,
		Status:      pb.AlertStatus(pb.AlertStatus_value[statusPrefix+strings.ToUpper(string(a.Status))]),
		Labels:      a.Labels,
		Annotations: a.Annotations,
		StartsAt:    timeToProto(&a.StartsAt),
		EndsAt:      timeToProto(a.EndsAt),
		Timestamp:   timeToProto(a.Timestamp),
	}
	if a.GeneratorURL != nil {
		alert.GeneratorUrl = *a.GeneratorURL
	}
	return alert
}

func alertFromProto(alert *pb.Alert) *Alert {
	a := &Alert{
		Fingerprint: alert.Fingerprint,
		AlertName:   alert.AlertName,
		Status:      AlertStatus(nameOf(alert.Status, statusPrefix)),
		Labels:      orEmpty(alert.Labels),
		Annotations: orEmpty(alert.Annotations),
		StartsAt:    timeOrZero(alert.StartsAt),
		EndsAt:      timeFromProto(alert.EndsAt),
		Timestamp:   timeFromProto(alert.Timestamp),
	}
	if alert.GeneratorUrl != "" {
		a.GeneratorURL = &alert.GeneratorUrl
	}
	return a
}

func timerToProto(t *TimerMetadata) *pb.TimerMetadata {
	if t == nil {
		return nil
	}
	return &pb.TimerMetadata{
		Version:     t.Version,
		CreatedBy:   t.CreatedBy,
		ResetCount:  count(t.ResetCount),
		LastResetAt: timeToProto(t.LastResetAt),
		LockId:      t.LockID,
	}
}

func timerFromProto(timer *pb.TimerMetadata) *TimerMetadata {
	if timer == nil {
		return nil
	}
	return &TimerMetadata{
		Version:     timer.Version,
		CreatedBy:   timer.CreatedBy,
		ResetCount:  int(timer.ResetCount),
		LastResetAt: timeFromProto(timer.LastResetAt),
		LockID:      timer.LockId,
	}
}

// count is a number as the API has it: its greatest where it is beyond that.
func count(n int) int32 {
	if n > math.MaxInt32 {
		return math.MaxInt32
	}
	if n < math.MinInt32 {
		return math.MinInt32
	}
	return int32(n)
}

// stamp sets when alerts were received whose Timestamp does not say it: there is none, or
// it is their StartsAt, as the service writes it. Alerts may be shared with other groups,
// so those of this one are replaced.
func stamp(group *AlertGroup, received time.Time) {
	for fingerprint, alert := range group.Alerts {
		if alert == nil || alert.Timestamp != nil && !alert.Timestamp.Equal(alert.StartsAt) {
			continue
		}
		stamped, at := *alert, received
		stamped.Timestamp = &at
		group.Alerts[fingerprint] = &stamped
	}
}

func setVersion(group *AlertGroup, version int64) {
	group.Version = version
	if group.Metadata != nil {
		group.Metadata.Version = version
	}
}

// timeToProto takes both forms in which the service says "unknown": nil and the
// zero time, which is not 1970.
func timeToProto(t *time.Time) *timestamppb.Timestamp {
	if t == nil || t.IsZero() {
		return nil
	}
	return timestamppb.New(*t)
}

func timeFromProto(timestamp *timestamppb.Timestamp) *time.Time {
	if timestamp == nil {
		return nil
	}
	t := timestamp.AsTime()
	return &t
}

func timeOrZero(timestamp *timestamppb.Timestamp) time.Time {
	if timestamp == nil {
		return time.Time{}
	}
	return timestamp.AsTime()
}

// orEmpty makes a map into which one can write: in a message an empty one is nil.
func orEmpty(labels map[string]string) map[string]string {
	if labels == nil {
		return map[string]string{}
	}
	return labels
}
