// What can go wrong with a call, and when it is made again.

package groupstate

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/groupstate/groupstate/clients/go/groupstatev1"
)

const (
	// How long a change or a read is begun anew, before its last error is returned:
	// longer than it takes to notice that an instance hangs (see keepalive).
	patience = 15 * time.Second
	// The pause before a second attempt, doubled for each further one.
	firstBackoff, longestBackoff = 10 * time.Millisecond, 500 * time.Millisecond
)

const reasonPrefix = "ERROR_REASON_"

// NotAuthoritativeError is a GroupNotFoundError of the memory of one instance, as while
// Redis is down. It cannot know what others hold, so who has seen the group must not
// forget it.
type NotAuthoritativeError struct {
	Key GroupKey
}

func (e *NotAuthoritativeError) Error() string {
	return fmt.Sprintf("group not found in the memory of one instance: %s", e.Key)
}

// Unwrap returns a *GroupNotFoundError.
func (e *NotAuthoritativeError) Unwrap() error { return &GroupNotFoundError{Key: e.Key} }

// OutcomeUnknownError says that it cannot be told whether a write happened: its
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

// PartialError says that a LoadAll or StoreAll was not the whole of it.
type PartialError struct {
	Operation string
	// The groups that could not be read or stored, each with its reason.
	Problems []Problem
	// Memory has answered a LoadAll in place of Redis, and cannot know every group.
	Incomplete bool
}

// Problem is what went wrong with one group of many.
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

// Reason is the name of an ErrorReason in the proto, such as "UNREADABLE_DOCUMENT".
// It is empty if an error is none of the service but of the gRPC library, such as a
// connection that broke.
func Reason(err error) string {
	info, _ := details(err)
	return info.GetReason()
}

// withStatus is an error of a call, be it of the service or of the gRPC library.
type withStatus interface{ GRPCStatus() *status.Status }

func details(err error) (info *errdetails.ErrorInfo, retry *errdetails.RetryInfo) {
	var call withStatus
	if !errors.As(err, &call) {
		return nil, nil
	}
	for _, detail := range call.GRPCStatus().Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == "groupstate" {
				info = detail
			}
		case *errdetails.RetryInfo:
			retry = detail
		}
	}
	return info, retry
}

// isUnknown says whether an error leaves open what became of a call.
func isUnknown(err error) bool {
	var call withStatus
	if !errors.As(err, &call) {
		return false
	}
	switch Reason(err) {
	case "", "OUTCOME_UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL":
		return true
	}
	return false
}

func writeFailure(operation string, key GroupKey, err error) error {
	if isUnknown(err) {
		return &OutcomeUnknownError{operation, key, err}
	}
	return readFailure(operation, key, err)
}

func readFailure(operation string, key GroupKey, err error) error {
	if err == nil {
		return nil
	}
	if info, _ := details(err); info.GetReason() == "GROUP_NOT_FOUND" {
		if info.Metadata["authoritative"] == "false" {
			return &NotAuthoritativeError{key}
		}
		return &GroupNotFoundError{Key: key}
	}
	return &StorageError{Operation: operation, Err: err}
}

func problemOf(problem *pb.GroupError) Problem {
	reason := ""
	if problem.Reason != pb.ErrorReason_ERROR_REASON_UNSPECIFIED {
		reason = problem.Reason.String()[len(reasonPrefix):]
	}
	return Problem{GroupKey(problem.Key), codes.Code(problem.Code), reason, problem.Message}
}

// turns are those of a loop that tries again, each after a pause. Its length is
// random, so that two clients which have met once do not go on meeting.
type turns struct {
	begun    bool
	giveUpAt time.Time
	longest  time.Duration
}

func newTurns() *turns {
	return &turns{giveUpAt: time.Now().Add(patience), longest: firstBackoff}
}

// next says whether there is another turn after one that ended so, and pauses.
func (t *turns) next(ctx context.Context, err error) bool {
	if !t.begun {
		t.begun = true
		return true
	}
	var mismatch *ErrVersionMismatch
	info, retry := details(err)
	again := isUnknown(err) || errors.As(err, &mismatch) || retry != nil || info.GetReason() == "LISTING_RESTARTED"
	if !again || time.Now().After(t.giveUpAt) {
		return false
	}
	pause := retry.GetRetryDelay().AsDuration() + time.Duration(rand.Int63n(int64(t.longest)))
	if t.longest *= 2; t.longest > longestBackoff {
		t.longest = longestBackoff
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
