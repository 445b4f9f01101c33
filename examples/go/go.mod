module github.com/groupstate/groupstate/examples/go

go 1.19

replace github.com/groupstate/groupstate/clients/go => ../../clients/go

require (
	github.com/groupstate/groupstate/clients/go v0.0.0
	google.golang.org/grpc v1.58.3
)
