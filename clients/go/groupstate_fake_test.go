// What a healthy service seldom does, by a server of our own that does it at once.

package groupstate

import (
	"context"
	"errors"
	"net"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/groupstate/groupstate/clients/go/groupstatev1"
)

// fake answers the calls that a test has set, each time by the next answer.
type fake struct {
	pb.UnimplementedGroupStateServiceServer
	swaps    []func(*pb.CompareAndSwapRequest) (*pb.CompareAndSwapResponse, error)
	loads    []func() (*pb.LoadResponse, error)
	listings []func(*pb.ListKeysRequest) (*pb.ListKeysResponse, error)
	streams  []func(pb.GroupStateService_LoadAllServer) error
}

func (f *fake) CompareAndSwap(_ context.Context, request *pb.CompareAndSwapRequest) (*pb.CompareAndSwapResponse, error) {
	answer := f.swaps[0]
	f.swaps = f.swaps[1:]
	return answer(request)
}

func (f *fake) Load(context.Context, *pb.LoadRequest) (*pb.LoadResponse, error) {
	answer := f.loads[0]
	f.loads = f.loads[1:]
	return answer()
}

func (f *fake) ListKeys(_ context.Context, request *pb.ListKeysRequest) (*pb.ListKeysResponse, error) {
	answer := f.listings[0]
	f.listings = f.listings[1:]
	return answer(request)
}

func (f *fake) LoadAll(_ *pb.LoadAllRequest, stream pb.GroupStateService_LoadAllServer) error {
	answer := f.streams[0]
	f.streams = f.streams[1:]
	return answer(stream)
}

// serve starts the fake, and returns a storage over it and what cuts it off.
func (f *fake) serve(t *testing.T) (*Storage, func()) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := grpc.NewServer()
	pb.RegisterGroupStateServiceServer(server, f)
	healthpb.RegisterHealthServer(server, health.NewServer())
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	storage, err := NewStorage(Config{Targets: []string{listener.Addr().String()}, DialOptions: insecure})
	must(t, err)
	t.Cleanup(storage.Close)
	return storage, server.Stop
}

func reasoned(code codes.Code, reason string) error {
	with, err := status.New(code, "as the test wants").WithDetails(
		&errdetails.ErrorInfo{Domain: "groupstate", Reason: reason})
	if err != nil {
		return err
	}
	return with.Err()
}

func outcomeUnknown(*pb.CompareAndSwapRequest) (*pb.CompareAndSwapResponse, error) {
	return nil, reasoned(codes.Aborted, "OUTCOME_UNKNOWN")
}

func TestAStoreOfUnknownOutcomeIsNoMismatch(t *testing.T) {
	var cutOff func()
	f := &fake{swaps: []func(*pb.CompareAndSwapRequest) (*pb.CompareAndSwapResponse, error){
		outcomeUnknown,
		func(*pb.CompareAndSwapRequest) (*pb.CompareAndSwapResponse, error) {
			go cutOff() // the answer is lost with its connection
			select {}
		},
	}}
	storage, cut := f.serve(t)
	cutOff = cut
	for range f.swaps {
		group := newGroup("g")
		group.Version = 16
		err := storage.Store(ctx, group)
		var unknown *OutcomeUnknownError
		if !errors.As(err, &unknown) || unknown.Key != "g" || group.Version != 16 {
			t.Fatalf("%#v", err)
		}
	}
	// Nothing is there any more: this one surely was not sent.
	var failure *StorageError
	if err := storage.Store(ctx, newGroup("g")); !errors.As(err, &failure) {
		t.Fatalf("%#v", err)
	}
}

func TestAChangeOfUnknownOutcomeIsAppliedToWhatIsStored(t *testing.T) {
	stored := newGroup("g")
	stored.Version = 32
	f := &fake{
		loads: []func() (*pb.LoadResponse, error){
			func() (*pb.LoadResponse, error) { return nil, reasoned(codes.NotFound, "GROUP_NOT_FOUND") },
			func() (*pb.LoadResponse, error) { return &pb.LoadResponse{Group: groupToProto(stored)}, nil },
		},
		swaps: []func(*pb.CompareAndSwapRequest) (*pb.CompareAndSwapResponse, error){
			outcomeUnknown,
			func(request *pb.CompareAndSwapRequest) (*pb.CompareAndSwapResponse, error) {
				if request.ExpectedVersion != 32 || len(request.Group.Alerts) != 2 {
					return nil, reasoned(codes.Internal, "TEST")
				}
				return &pb.CompareAndSwapResponse{Swapped: true, Version: 48}, nil
			},
		},
	}
	storage, _ := f.serve(t)
	group, err := storage.Change(ctx, "g", func(group *AlertGroup) error {
		group.Alerts["a2"] = &Alert{Fingerprint: "a2", Status: "firing"}
		return nil
	})
	must(t, err)
	if group.Version != 48 || len(group.Alerts) != 2 {
		t.Fatalf("%+v", group)
	}
}

func TestAListingThatWasRestartedBeginsAgain(t *testing.T) {
	page := func(token string, next string, keys ...string) func(*pb.ListKeysRequest) (*pb.ListKeysResponse, error) {
		return func(request *pb.ListKeysRequest) (*pb.ListKeysResponse, error) {
			if request.PageToken != token {
				return nil, reasoned(codes.Internal, "TEST")
			}
			return &pb.ListKeysResponse{Keys: keys, NextPageToken: next}, nil
		}
	}
	f := &fake{listings: []func(*pb.ListKeysRequest) (*pb.ListKeysResponse, error){
		page("", "1", "deleted meanwhile"),
		func(*pb.ListKeysRequest) (*pb.ListKeysResponse, error) {
			return nil, reasoned(codes.Aborted, "LISTING_RESTARTED")
		},
		page("", "2", "a"),
		page("2", "3"),
		page("3", "", "b", "a"),
	}}
	storage, _ := f.serve(t)
	keys, err := storage.ListKeys(ctx)
	must(t, err)
	if len(keys) != 2 || keys[0] != "a" || keys[1] != "b" {
		t.Fatal(keys)
	}
}

func TestAStreamWithoutSummaryIsReadAgain(t *testing.T) {
	group := groupToProto(newGroup("g"))
	f := &fake{streams: []func(pb.GroupStateService_LoadAllServer) error{
		func(stream pb.GroupStateService_LoadAllServer) error {
			return stream.Send(&pb.LoadAllResponse{Groups: []*pb.AlertGroup{{Key: "deleted meanwhile"}}})
		},
		func(stream pb.GroupStateService_LoadAllServer) error {
			if err := stream.Send(&pb.LoadAllResponse{Groups: []*pb.AlertGroup{group}}); err != nil {
				return err
			}
			return stream.Send(&pb.LoadAllResponse{Summary: &pb.LoadAllSummary{Groups: 1, Complete: true}})
		},
	}}
	storage, _ := f.serve(t)
	groups, err := storage.LoadAll(ctx)
	must(t, err)
	if len(groups) != 1 || groups[0].Key != "g" {
		t.Fatalf("%+v", groups)
	}
}
