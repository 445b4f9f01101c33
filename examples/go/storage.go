// Package grouping keeps the groups of the Go alert-history service in groupstate:
// Storage is a GroupStorage, in the place of the service's own RedisGroupStorage.
//
// Copy storage.go, convert.go and instances.go into the service's package grouping,
// and see grouping.go for what else is new. The stubs are generated, by protoc and
// its plugins protoc-gen-go and protoc-gen-go-grpc:
//
//	go generate && go mod tidy
//	go run ./demo localhost:50051
//
// With the packages of Debian in place of modules (golang-google-grpc-dev and others,
// see tests/tools/install.sh), the repository is put into a GOPATH:
//
//	mkdir -p gopath/src/github.com/groupstate
//	cp -r REPOSITORY gopath/src/github.com/groupstate/groupstate
//	export GO111MODULE=off GOPATH="$PWD/gopath:/usr/share/gocode"
//
// Run the service with --on-recovery reconcile: the interface has no room for "only
// memory has this yet", which a replica would have to know of to make the change
// again after a recovery that discards.
package grouping

//go:generate protoc -I ../../proto --go_out=. --go-grpc_out=. --go_opt=module=github.com/groupstate/groupstate/examples/go --go_opt=Mgroupstate/v1/group_state.proto=github.com/groupstate/groupstate/examples/go/groupstatev1 --go-grpc_opt=module=github.com/groupstate/groupstate/examples/go --go-grpc_opt=Mgroupstate/v1/group_state.proto=github.com/groupstate/groupstate/examples/go/groupstatev1 groupstate/v1/group_state.proto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/groupstate/groupstate/examples/go/groupstatev1"
)

const (
	// Deadline of a call on one group, if the caller has none that is shorter. The
	// service answers within 1 s, from memory if need be; with less, a call may end in
	// the half second in which a hung Redis has not been given up yet.
	callTimeout = 2 * time.Second
	// Deadline of a listing, which reads every key there is, and of a batch.
	listingTimeout = 60 * time.Second
	// How long a change or a read is begun anew, before its last error is returned:
	// longer than it takes to notice that an instance hangs (see keepalive).
	patience = 15 * time.Second
	// The pause before a second attempt, doubled for each further one.
	firstBackoff, longestBackoff = 10 * time.Millisecond, 500 * time.Millisecond
	// Size of a batch, well below --max-groups-per-batch and --max-request-bytes, and
	// with keys of 4 KiB below 512 KiB of keys.
	batchGroups, batchBytes = 100, 4 << 20
)

// Config says where the instances are.
type Config struct {
	// HOST:PORT of each. All addresses of a host are used, such as those of a headless
	// Service of Kubernetes.
	Targets []string
	// When a group expires that was stored; 0 means the server's default.
	TTL time.Duration
	// Transport credentials at least. Connections are made to addresses, so with TLS
	// the tls.Config needs the ServerName.
	DialOptions []grpc.DialOption
}

// Storage is a GroupStorage over the API of groupstate. It may be used by many
// goroutines.
type Storage struct {
	instances *instances
	ttl       time.Duration
}

var _ GroupStorage = (*Storage)(nil)

// NewStorage resolves the targets. It does not wait for the instances.
func NewStorage(config Config) (*Storage, error) {
	all, err := newInstances(config.Targets, config.DialOptions)
	if err != nil {
		return nil, err
	}
	return &Storage{instances: all, ttl: config.TTL}, nil
}

// Close closes the connections.
func (s *Storage) Close() { s.instances.close() }

// Store replaces version group.Version of a group, or with 0 creates it, and writes
// the new version into the struct.
//
// A lost race is an *ErrVersionMismatch and nothing was stored: load the group and
// apply the change again, as Change does. So it is if Version is not 0 and the group
// is gone, which the error says; at version 0 it would be created anew. After an
// *OutcomeUnknownError the group may have been stored or not.
func (s *Storage) Store(ctx context.Context, group *AlertGroup) error {
	if group == nil {
		return &StorageError{"store", errors.New("the group is nil")}
	}
	instance, err := s.instances.of(ctx, group.Key)
	if err != nil {
		return &StorageError{"store", err}
	}
	_, err = s.swap(ctx, instance, group)
	return err
}

// Change changes a group that others change at the same moment, and loses nothing.
//
// apply gets the group as it is, or a new one without alerts, and changes it in
// place. It is called again after a lost race, with what is stored by then: so it
// must be the change (add this alert), not its result (store these alerts), and must
// not mind to meet itself. Merging two whole groups instead would bring back what
// others have removed.
//
// The interface does not have this, but it is how a replica should write: the lost
// race has brought the current group along, and no Load is needed.
func (s *Storage) Change(ctx context.Context, key GroupKey, apply func(*AlertGroup) error) (*AlertGroup, error) {
	var (
		instance *instance
		group    *AlertGroup
		err      error
	)
	for turns := newTurns(); turns.next(ctx, err); {
		if group == nil {
			// The loop stays with this instance: while Redis is down, versions are those
			// of its memory.
			if instance, err = s.instances.of(ctx, key); err != nil {
				err = &StorageError{"change", err}
				continue
			}
			if group, err = loadOrNew(ctx, instance, key); err != nil {
				continue
			}
		}
		if err = apply(group); err != nil {
			return nil, err
		}
		var current *AlertGroup
		if current, err = s.swap(ctx, instance, group); err == nil {
			return group, nil
		}
		// After a lost race, the winner's group. After anything else nothing, so that it
		// is loaded: an unknown outcome is like a lost race, whose winner may be us.
		group = current
	}
	return nil, err
}

// Load reads a group; *GroupNotFoundError if there is none.
func (s *Storage) Load(ctx context.Context, groupKey GroupKey) (*AlertGroup, error) {
	var group *AlertGroup
	err := s.read(ctx, groupKey, callTimeout, func(ctx context.Context, groups pb.GroupStateServiceClient) error {
		reply, err := groups.Load(ctx, &pb.LoadRequest{Key: string(groupKey)})
		if err == nil {
			group = groupFromProto(reply.Group)
		}
		return err
	})
	return group, readFailure("load", groupKey, err)
}

// Delete removes a group, whatever its version. It is no error if there is none.
func (s *Storage) Delete(ctx context.Context, groupKey GroupKey) error {
	instance, err := s.instances.of(ctx, groupKey)
	if err != nil {
		return &StorageError{"delete", err}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = instance.groups.Delete(ctx, &pb.DeleteRequest{Key: string(groupKey)})
	return writeFailure("delete", groupKey, instance.noted(err))
}

// ListKeys returns the keys of all groups. While Redis is down these are the ones
// that one instance knows, and so it is with Size.
func (s *Storage) ListKeys(ctx context.Context) ([]GroupKey, error) {
	var keys []GroupKey
	err := s.read(ctx, "", listingTimeout, func(ctx context.Context, groups pb.GroupStateServiceClient) error {
		keys = []GroupKey{}
		seen := map[string]bool{} // keys may repeat
		request := &pb.ListKeysRequest{}
		for {
			page, err := groups.ListKeys(ctx, request)
			if err != nil {
				return err
			}
			for _, key := range page.Keys {
				if !seen[key] {
					seen[key] = true
					keys = append(keys, GroupKey(key))
				}
			}
			// Nothing else ends a listing: a page may be empty and not the last.
			if page.NextPageToken == "" {
				return nil
			}
			request.PageToken = page.NextPageToken
		}
	})
	return keys, readFailure("list_keys", "", err)
}

// Size counts the groups, approximately while they change.
func (s *Storage) Size(ctx context.Context) (int, error) {
	var size int64
	err := s.read(ctx, "", listingTimeout, func(ctx context.Context, groups pb.GroupStateServiceClient) error {
		reply, err := groups.Size(ctx, &pb.SizeRequest{})
		size = reply.GetCount()
		return err
	})
	return int(size), readFailure("size", "", err)
}

// LoadAll reads all groups, as after a restart. What could be read is returned
// together with a *PartialError if there are groups that cannot be read, or if memory
// has answered in place of Redis and cannot know all of them.
func (s *Storage) LoadAll(ctx context.Context) ([]*AlertGroup, error) {
	var (
		byKey   map[GroupKey]*AlertGroup
		partial *PartialError
	)
	err := s.read(ctx, "", listingTimeout, func(ctx context.Context, groups pb.GroupStateServiceClient) error {
		byKey, partial = map[GroupKey]*AlertGroup{}, &PartialError{Operation: "load_all"}
		stream, err := groups.LoadAll(ctx, &pb.LoadAllRequest{})
		if err != nil {
			return err
		}
		complete := false
		for {
			reply, err := stream.Recv()
			if err == io.EOF && !complete {
				return status.Error(codes.DataLoss, "the stream has ended without its summary")
			}
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			for _, group := range reply.Groups {
				// A group may come twice, and the later one is newer.
				byKey[GroupKey(group.Key)] = groupFromProto(group)
			}
			for _, problem := range reply.Problems {
				partial.Problems = append(partial.Problems, problemOf(problem))
			}
			if reply.Summary != nil {
				complete = true
				partial.Incomplete = !reply.Summary.Complete
			}
		}
	})
	if err != nil {
		return nil, readFailure("load_all", "", err)
	}
	all := make([]*AlertGroup, 0, len(byKey))
	for _, group := range byKey {
		all = append(all, group)
	}
	if len(partial.Problems) > 0 || partial.Incomplete {
		return all, partial
	}
	return all, nil
}

// StoreAll stores groups whatever is there, and writes their new versions into the
// structs. Those that were not stored are named by a *PartialError; the others were.
func (s *Storage) StoreAll(ctx context.Context, groups []*AlertGroup) error {
	partial := &PartialError{Operation: "store_all"}
	byKey := make(map[string]*AlertGroup, len(groups))
	batches := map[*instance][]*pb.AlertGroup{}
	for _, group := range groups {
		if group == nil {
			return &StorageError{"store_all", errors.New("a group is nil")}
		}
		if byKey[string(group.Key)] != nil {
			return &StorageError{"store_all", fmt.Errorf("group %s is there twice", group.Key)}
		}
		byKey[string(group.Key)] = group
		instance, err := s.instances.of(ctx, group.Key)
		if err != nil {
			return &StorageError{"store_all", err}
		}
		encoded, err := encode(group)
		if err != nil {
			problem := Problem{group.Key, codes.InvalidArgument, "INVALID_FIELD", err.Error()}
			partial.Problems = append(partial.Problems, problem)
			continue
		}
		batches[instance] = append(batches[instance], encoded)
	}
	for instance, rest := range batches {
		for len(rest) > 0 {
			batch := rest[:lengthOfBatch(rest)]
			rest = rest[len(batch):]
			for _, result := range s.storeBatch(ctx, instance, batch) {
				if result.Error != nil {
					partial.Problems = append(partial.Problems, problemOf(result.Error))
				} else {
					byKey[result.Key].setVersion(result.Version)
				}
			}
		}
	}
	if len(partial.Problems) > 0 {
		return partial
	}
	return nil
}

// Ping says whether Redis answers: nil if all instances that are up have it, and one
// is up at least. An error is no reason to leave the service: memory has taken over.
func (s *Storage) Ping(ctx context.Context) error {
	err := error(&unreachableError{s.instances.targets})
	for _, instance := range s.instances.ranked("") {
		if !instance.isUp(ctx) {
			continue
		}
		var hasRedis bool
		if hasRedis, err = instance.serving(ctx, "redis"); err == nil && !hasRedis {
			err = fmt.Errorf("%s gets no answer from Redis and keeps groups in memory", instance.address)
		}
		if err != nil {
			break
		}
	}
	if err != nil {
		return &StorageError{"ping", err}
	}
	return nil
}

// === One call ===

// swap makes one CompareAndSwap. With *ErrVersionMismatch it returns the group that
// is there now, if any.
func (s *Storage) swap(ctx context.Context, instance *instance, group *AlertGroup) (*AlertGroup, error) {
	encoded, err := encode(group)
	if err != nil {
		return nil, &StorageError{"store", err}
	}
	request := &pb.CompareAndSwapRequest{Group: encoded, ExpectedVersion: group.Version}
	if s.ttl != 0 {
		request.Expiry = &pb.CompareAndSwapRequest_Ttl{Ttl: durationpb.New(s.ttl)}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	reply, err := instance.groups.CompareAndSwap(ctx, request)
	if err != nil {
		return nil, writeFailure("store", group.Key, instance.noted(err))
	}
	if reply.Swapped {
		group.setVersion(reply.Version)
		return nil, nil
	}
	mismatch := &ErrVersionMismatch{Key: group.Key, ExpectedVersion: group.Version, ActualVersion: reply.Version}
	if reply.Current == nil {
		return nil, mismatch
	}
	return groupFromProto(reply.Current), mismatch
}

// encode makes a message of a group. What is not UTF-8 fails here, before anything
// is sent: from the gRPC library, it would look like a call with an unknown outcome.
func encode(group *AlertGroup) (*pb.AlertGroup, error) {
	encoded := groupToProto(group)
	_, err := proto.Marshal(encoded)
	return encoded, err
}

func loadOrNew(ctx context.Context, instance *instance, key GroupKey) (*AlertGroup, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	reply, err := instance.groups.Load(ctx, &pb.LoadRequest{Key: string(key)})
	if Reason(err) == "GROUP_NOT_FOUND" {
		return &AlertGroup{Key: key, Alerts: map[string]*Alert{}, Metadata: &GroupMetadata{}}, nil
	}
	if err != nil {
		return nil, readFailure("load", key, instance.noted(err))
	}
	return groupFromProto(reply.Group), nil
}

// storeBatch makes one StoreAll. If it fails as a whole, each group has failed so.
func (s *Storage) storeBatch(ctx context.Context, instance *instance, batch []*pb.AlertGroup) []*pb.StoreResult {
	request := &pb.StoreAllRequest{Groups: batch}
	if s.ttl != 0 {
		request.Expiry = &pb.StoreAllRequest_Ttl{Ttl: durationpb.New(s.ttl)}
	}
	ctx, cancel := context.WithTimeout(ctx, listingTimeout)
	defer cancel()
	reply, err := instance.groups.StoreAll(ctx, request)
	if instance.noted(err) == nil {
		return reply.Results
	}
	results := make([]*pb.StoreResult, len(batch))
	for n, group := range batch {
		results[n] = &pb.StoreResult{Key: group.Key, Error: &pb.GroupError{
			Key:     group.Key,
			Code:    int32(status.Code(err)),
			Reason:  pb.ErrorReason(pb.ErrorReason_value[reasonPrefix+Reason(err)]),
			Message: err.Error(),
		}}
	}
	return results
}

func lengthOfBatch(groups []*pb.AlertGroup) int {
	bytes := 0
	for n, group := range groups {
		bytes += proto.Size(group)
		if n == batchGroups || n > 0 && bytes > batchBytes {
			return n
		}
	}
	return len(groups)
}

func (g *AlertGroup) setVersion(version int64) {
	g.Version = version
	if g.Metadata != nil {
		g.Metadata.Version = version
	}
}

// read gets something from an instance. Reads may be repeated, so the next one is
// asked when one does not answer.
func (s *Storage) read(ctx context.Context, key GroupKey, timeout time.Duration,
	call func(context.Context, pb.GroupStateServiceClient) error) error {
	var err error
	for turns := newTurns(); turns.next(ctx, err); {
		err = &unreachableError{s.instances.targets}
		for _, instance := range s.instances.ranked(key) {
			if !instance.isUp(ctx) {
				continue
			}
			callCtx, cancel := context.WithTimeout(ctx, timeout)
			err = instance.noted(call(callCtx, instance.groups))
			cancel()
			if !isUnknown(err) {
				break
			}
		}
		if err == nil {
			return nil
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// === What can go wrong ===

const reasonPrefix = "ERROR_REASON_"

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
		return &GroupNotFoundError{Key: key, Authoritative: info.Metadata["authoritative"] != "false"}
	}
	return &StorageError{operation, err}
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
