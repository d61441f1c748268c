package builtin

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/kernel"
)

func TestOneNetworkForEachNamespace(t *testing.T) {
	ns, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS, kernel.UTSNS}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ns[0].Close()
	defer ns[1].Close()
	f, err := lockNode(ns[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockNode(ns[0]); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("second lock: %v", err)
	}
	if err := unlockNode(f); err != nil {
		t.Fatal(err)
	}
	again, err := lockNode(ns[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := unlockNode(again); err != nil {
		t.Fatal(err)
	}
}
