// containerd's own snapshotter test suite, against a snapshots service on a unix socket.
//
// $ADDRESS names the socket. tests/suite/run builds this with the packages of Debian, and starts the service.
package suite

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/pkg/testutil"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

// The suite expects of this name what overlayfs can do: it renames no directory of a lower layer.
const name = "overlayfs"

func TestSnapshotter(t *testing.T) {
	testutil.RequiresRoot(t)
	connection, err := grpc.Dial("unix://"+os.Getenv("ADDRESS"), grpc.WithInsecure(), grpc.WithBlock())
	if err != nil {
		t.Fatal(err)
	}
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), name)
	// All cases share one service, side by side, as they would in containerd.
	shared := func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		return snapshotter, nil, nil
	}
	testsuite.SnapshotterSuite(t, name, shared)
}
