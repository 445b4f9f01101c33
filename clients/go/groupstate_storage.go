// The GroupStorage itself.

package groupstate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/groupstate/groupstate/clients/go/groupstatev1"
)

const (
	// Deadline of a call on one group, if the caller has none that is shorter. The
	// service answers within 1 s, from memory if need be; with less, a call may end in
	// the half second in which a hung Redis has not been given up yet.
	callTimeout = 2 * time.Second
	// Deadline of a listing, which reads every key there is, and of a batch.
	listingTimeout = 60 * time.Second
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
	// OnPartial is told of what is missing in a LoadAll; by default the log is.
	OnPartial func(*PartialError)
}

// Storage is a GroupStorage over the API of groupstate. It may be used by many
// goroutines.
type Storage struct {
	instances *instances
	ttl       time.Duration
	onPartial func(*PartialError)
}

var _ GroupStorage = (*Storage)(nil)

// NewStorage resolves the targets. It does not wait for the instances.
func NewStorage(config Config) (*Storage, error) {
	all, err := newInstances(config.Targets, config.DialOptions)
	if err != nil {
		return nil, err
	}
	onPartial := config.OnPartial
	if onPartial == nil {
		onPartial = func(partial *PartialError) { log.Print("groupstate: ", partial) }
	}
	return &Storage{instances: all, ttl: config.TTL, onPartial: onPartial}, nil
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
		return &StorageError{Operation: "store", Err: errors.New("the group is nil")}
	}
	instance, err := s.instances.of(ctx, group.Key)
	if err != nil {
		return &StorageError{Operation: "store", Err: err}
	}
	stamp(group, time.Now())
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
		// The same in every turn: the report was received before it could be stored.
		received = time.Now()
	)
	for turns := newTurns(); turns.next(ctx, err); {
		if group == nil {
			// The loop stays with this instance: while Redis is down, versions are those
			// of its memory.
			if instance, err = s.instances.of(ctx, key); err != nil {
				err = &StorageError{Operation: "change", Err: err}
				continue
			}
			if group, err = loadOrNew(ctx, instance, key); err != nil {
				continue
			}
		}
		if err = apply(group); err != nil {
			return nil, err
		}
		stamp(group, received)
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

// Load reads a group; *GroupNotFoundError if there is none, or a *NotAuthoritativeError
// that is one.
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
		return &StorageError{Operation: "delete", Err: err}
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

// LoadAll reads all groups, as after a restart. Groups that cannot be read are left out,
// and so may others be if memory has answered in place of Redis and cannot know all of
// them: Config.OnPartial is told, and there is no error, since one unreadable document must
// not keep a replica from starting. Restore says both.
func (s *Storage) LoadAll(ctx context.Context) ([]*AlertGroup, error) {
	all, partial, err := s.Restore(ctx)
	if partial != nil {
		s.onPartial(partial)
	}
	return all, err
}

// Restore reads all groups, and says what is missing: nil if nothing is.
func (s *Storage) Restore(ctx context.Context) ([]*AlertGroup, *PartialError, error) {
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
		return nil, nil, readFailure("load_all", "", err)
	}
	all := make([]*AlertGroup, 0, len(byKey))
	for _, group := range byKey {
		all = append(all, group)
	}
	if len(partial.Problems) > 0 || partial.Incomplete {
		return all, partial, nil
	}
	return all, nil, nil
}

// StoreAll stores groups whatever is there, and writes their new versions into the
// structs. A nil is passed over; of two groups of one key the later one is stored. Those
// that were not stored are named by a *PartialError; the others were.
func (s *Storage) StoreAll(ctx context.Context, groups []*AlertGroup) error {
	partial := &PartialError{Operation: "store_all"}
	byKey := make(map[string]*AlertGroup, len(groups))
	for _, group := range groups {
		if group != nil {
			byKey[string(group.Key)] = group
		}
	}
	received := time.Now()
	batches := map[*instance][]*pb.AlertGroup{}
	for _, group := range byKey {
		stamp(group, received)
		instance, err := s.instances.of(ctx, group.Key)
		if err != nil {
			return &StorageError{Operation: "store_all", Err: err}
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
					setVersion(byKey[result.Key], result.Version)
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
		return &StorageError{Operation: "ping", Err: err}
	}
	return nil
}

// === One call ===

// swap makes one CompareAndSwap. With *ErrVersionMismatch it returns the group that
// is there now, if any.
func (s *Storage) swap(ctx context.Context, instance *instance, group *AlertGroup) (*AlertGroup, error) {
	encoded, err := encode(group)
	if err != nil {
		return nil, &StorageError{Operation: "store", Err: err}
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
		setVersion(group, reply.Version)
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
