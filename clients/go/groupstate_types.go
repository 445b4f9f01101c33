// The types of the alert-history service under the names that this package uses: the only
// file that says where they come from.

package groupstate

import (
	// In the service: its packages grouping and core.
	core "github.com/groupstate/groupstate/clients/go/grouping"
	grouping "github.com/groupstate/groupstate/clients/go/grouping"
)

type (
	GroupStorage       = grouping.GroupStorage
	GroupKey           = grouping.GroupKey
	AlertGroup         = grouping.AlertGroup
	GroupState         = grouping.GroupState
	GroupMetadata      = grouping.GroupMetadata
	TimerMetadata      = grouping.TimerMetadata
	GroupNotFoundError = grouping.GroupNotFoundError
	ErrVersionMismatch = grouping.ErrVersionMismatch
	StorageError       = grouping.StorageError

	Alert       = core.Alert
	AlertStatus = core.AlertStatus
)
