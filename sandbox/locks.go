package sandbox

import "github.com/berth-runtime/berth/internal/ranked"

// The lock order of the package comment, outer first. The tests of the package
// check it, and that nothing from objectLock on is held across a call to the
// supervisor, the network or the images.
const (
	podSlot ranked.Rank = iota + 1
	containerSlot
	objectRank
	engineRank
	leafRank
)

type (
	objectLock struct{} // pod.mu, container.mu: one of them at a time
	engineLock struct{} // Engine.mu
	leafLock   struct{} // the table of operations, a stop's deadline, the table of sizes
)

func (objectLock) Rank() ranked.Rank { return objectRank }
func (engineLock) Rank() ranked.Rank { return engineRank }
func (leafLock) Rank() ranked.Rank   { return leafRank }
