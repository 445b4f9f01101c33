// Which instance of groupstate a key belongs to, and the connections to all of them.
//
// One key is served by one instance. While Redis is down each instance answers from
// its own memory; a client that goes from one to the other, as a round robin does,
// compares the versions of one memory with those of another and loses every race.

package groupstate

import (
	"context"
	"fmt"
	"net"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "github.com/groupstate/groupstate/clients/go/groupstatev1"
)

const (
	// After this time, an instance that cannot be reached is passed over.
	connectTimeout = 500 * time.Millisecond
	// After this time, names are resolved again, so that new instances are used.
	resolveEvery = 10 * time.Second
)

// score says how much an instance is wanted for a key; the highest one serves it.
// This is rendezvous hashing: when an instance leaves, only its own keys move, each
// to the next in its rank. All clients must agree, whatever language they are
// written in, so the rule is fixed (tests/data/rendezvous-vectors.json has examples):
//
//	score(address, key) = fmix64(fnv1a64(address + "\n" + key))
//
// over the bytes of UTF-8; the address is IP:PORT, with an IPv6 in brackets. The
// scores are compared as unsigned numbers. Equal ones, if that ever happens, are
// ordered by address.
//
// FNV-1a is what every language can do. Behind it stands the finalizer of
// MurmurHash3, since FNV alone leaves the high bits of similar addresses alike.
func score(address, key string) uint64 {
	h := uint64(0xcbf29ce484222325)
	for _, b := range []byte(address + "\n" + key) {
		h = (h ^ uint64(b)) * 0x100000001b3
	}
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// rank sorts addresses: the first one serves the key, the next one if it is down.
func rank(addresses []string, key string) {
	sort.Slice(addresses, func(i, j int) bool {
		a, b := score(addresses[i], key), score(addresses[j], key)
		return a > b || a == b && addresses[i] < addresses[j]
	})
}

// instance is a connection to one instance of the service.
type instance struct {
	address string
	conn    *grpc.ClientConn
	groups  pb.GroupStateServiceClient
	health  healthpb.HealthClient
	// A call has ended without an answer, so it may hang although it is connected.
	suspect atomic.Bool
}

func connect(address string, options []grpc.DialOption) (*instance, error) {
	ours := []grpc.DialOption{
		// Each connection has one address. The choice of the instance is ours.
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"pick_first": {}}]}`),
		// No retryPolicy, neither ours nor one from DNS: the repetition of a swap that
		// succeeded looks like a lost race.
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		// An instance that is gone without a word is noticed within 13 s, idle or not.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time:                10 * time.Second,
			Timeout:             3 * time.Second,
			PermitWithoutStream: true,
		}),
		// The default of two minutes would keep an instance unused long after its return.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  100 * time.Millisecond,
				Multiplier: 1.6,
				Jitter:     0.2,
				MaxDelay:   time.Second,
			},
			MinConnectTimeout: time.Second,
		}),
	}
	conn, err := grpc.Dial(address, append(ours, options...)...)
	if err != nil {
		return nil, err
	}
	return &instance{
		address: address,
		conn:    conn,
		groups:  pb.NewGroupStateServiceClient(conn),
		health:  healthpb.NewHealthClient(conn),
	}, nil
}

// isUp says whether a call can be sent. Where that is in doubt, a question about
// health is sent before: of a write it could not be told whether it has arrived.
func (i *instance) isUp(ctx context.Context) bool {
	if i.conn.GetState() == connectivity.Ready && !i.suspect.Load() {
		return true
	}
	serving, err := i.serving(ctx, "")
	if err == nil && serving {
		i.suspect.Store(false)
	}
	return err == nil && serving
}

// noted remembers how a call ended, and returns its error.
func (i *instance) noted(err error) error {
	if isUnknown(err) {
		i.suspect.Store(true)
	}
	return err
}

// serving asks about the health of a service: "" is the instance itself, "redis" says
// whether it gets its answers from Redis.
func (i *instance) serving(ctx context.Context, service string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	reply, err := i.health.Check(ctx, &healthpb.HealthCheckRequest{Service: service})
	return reply.GetStatus() == healthpb.HealthCheckResponse_SERVING, err
}

// instances are all that the targets stand for, by address.
type instances struct {
	targets []string
	options []grpc.DialOption

	mu         sync.Mutex
	byAddress  map[string]*instance
	resolvedAt time.Time
}

func newInstances(targets []string, options []grpc.DialOption) (*instances, error) {
	all := &instances{targets: targets, options: options, byAddress: map[string]*instance{}}
	all.resolvedAt = time.Now()
	return all, all.resolve()
}

// ranked returns the instances as they rank for a key.
func (all *instances) ranked(key GroupKey) []*instance {
	all.mu.Lock()
	defer all.mu.Unlock()
	if time.Since(all.resolvedAt) > resolveEvery {
		all.resolvedAt = time.Now()
		go all.resolve() // without an answer from DNS, we go on with what we have
	}
	addresses := make([]string, 0, len(all.byAddress))
	for address := range all.byAddress {
		addresses = append(addresses, address)
	}
	rank(addresses, string(key))
	ranked := make([]*instance, len(addresses))
	for n, address := range addresses {
		ranked[n] = all.byAddress[address]
	}
	return ranked
}

// of returns the instance that serves a key now: the first in its rank that is up.
func (all *instances) of(ctx context.Context, key GroupKey) (*instance, error) {
	for _, instance := range all.ranked(key) {
		if instance.isUp(ctx) {
			return instance, nil
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return nil, &unreachableError{all.targets}
}

// resolve looks up what the targets stand for now.
func (all *instances) resolve() error {
	ctx, cancel := context.WithTimeout(context.Background(), resolveEvery)
	defer cancel()
	found := map[string]bool{}
	for _, target := range all.targets {
		host, port, err := net.SplitHostPort(target)
		if err != nil {
			return err
		}
		ips, err := net.DefaultResolver.LookupHost(ctx, host)
		if err != nil {
			return err
		}
		for _, ip := range ips {
			found[net.JoinHostPort(ip, port)] = true
		}
	}

	all.mu.Lock()
	defer all.mu.Unlock()
	for address := range found {
		if all.byAddress[address] == nil {
			instance, err := connect(address, all.options)
			if err != nil {
				return err
			}
			all.byAddress[address] = instance
		}
	}
	for address, instance := range all.byAddress {
		if !found[address] {
			delete(all.byAddress, address)
			conn := instance.conn
			time.AfterFunc(listingTimeout, func() { conn.Close() }) // calls in flight end first
		}
	}
	return nil
}

func (all *instances) close() {
	all.mu.Lock()
	defer all.mu.Unlock()
	for _, instance := range all.byAddress {
		instance.conn.Close()
	}
}

// unreachableError says that nothing was sent, as no instance can be reached. It may
// pass, like a connection that broke, whose status it has.
type unreachableError struct{ targets []string }

func (e *unreachableError) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, e.Error())
}

func (e *unreachableError) Error() string {
	return fmt.Sprintf("no instance can be reached: %s", strings.Join(e.targets, ", "))
}
