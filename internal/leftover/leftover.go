// Package leftover is how the parts of Berth name what they find that belongs to
// no record: what a crash or a bug left of a pod, a container or an image. Each
// part knows how to look for its own; the engine, each minute, and `berth fsck`
// ask all of them.
package leftover

import (
	"cmp"
	"context"
	"slices"
	"time"
)

// Kind says what was left. Kinds are labels of metrics: there are few, and they stay.
type Kind string

// Kinds of leftovers.
const (
	Container  Kind = "container"   // known to the supervisor and to no record
	Process    Kind = "process"     // in the cgroup of a container that is gone
	Cgroup     Kind = "cgroup"      // of a container or pod that is gone
	Descriptor Kind = "descriptor"  // kept by the supervisor for a pod that is gone
	Mount      Kind = "mount"       // in the host's mount table
	NetNS      Kind = "netns"       // a pinned network namespace
	Address    Kind = "address"     // allocated to a pod that is gone
	Port       Kind = "port"        // published for a pod that is gone
	Link       Kind = "link"        // the host's end of a pod's link
	Layer      Kind = "layer"       // writable layer of a container that is gone
	Image      Kind = "image"       // removed by name and used by nobody, or without its layers
	ImageLayer Kind = "image-layer" // layer of no image, or part of one
	PodFiles   Kind = "pod-files"   // /etc/hosts and the like of a pod that is gone
	Bundle     Kind = "bundle"      // of an external runtime, of a container that is gone
	Log        Kind = "log"         // open in the supervisor for a container that is gone
	Lost       Kind = "lost"        // on record as running, and its process is not there
	Record     Kind = "record"      // set aside because it cannot be read
)

// Kinds lists all kinds, in the order in which leftovers are to be removed: a
// container before what is left of it, a process before its cgroup, a mount before
// the folder that it is in, an image before its layers.
var Kinds = []Kind{Container, Process, Cgroup, Descriptor, Mount, NetNS, Address, Port, Link, Layer, Image, ImageLayer, PodFiles, Bundle, Log, Lost, Record}

// Finding is one thing that was left.
type Finding struct {
	Kind Kind `json:"kind"`
	// Name is unique among the findings of a kind: a path, an id, a link's name.
	Name string `json:"name"`
	// Detail says why it is a leftover.
	Detail string `json:"detail"`
	// Remedy says what to do where Berth does not remove it by itself.
	Remedy string `json:"remedy,omitempty"`
	// Since is when it was made or left; zero when that is not known.
	Since time.Time `json:"since,omitzero"`
	// Remove removes it, unless it has come to be somebody's meanwhile, which it
	// looks for once more. It may be called again after an error. nil: it is only
	// reported, because it may be of use to somebody, or because that it is Berth's
	// cannot be proved.
	Remove func(context.Context) error `json:"-"`
}

type key struct {
	kind Kind
	name string
}

func (f Finding) key() key { return key{f.Kind, f.Name} }

// Sort orders findings by kind, as they are to be removed, and by name.
func Sort(all []Finding) {
	slices.SortStableFunc(all, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(slices.Index(Kinds, a.Kind), slices.Index(Kinds, b.Kind)), cmp.Compare(a.Name, b.Name))
	})
}

// Sightings remembers what was found at the last looks. What is seen once may be on
// its way: an operation is taking it down, or the kernel is. It counts when it is
// seen again, Settle later or more.
type Sightings struct {
	Settle time.Duration
	seen   map[key]*sighting
}

type sighting struct {
	first   time.Time
	counted bool
}

// Seen takes the outcome of a look at the time now. It returns what counts, which
// of it (by index) counts for the first time, and how many have yet to be seen again.
func (s *Sightings) Seen(found []Finding, now time.Time) (count []Finding, first map[int]bool, fresh int) {
	next := make(map[key]*sighting, len(found))
	first = map[int]bool{}
	for _, f := range found {
		if next[f.key()] != nil { // two parts found the same
			continue
		}
		old := s.seen[f.key()]
		if old == nil {
			old = &sighting{first: now}
		}
		next[f.key()] = old
		if now == old.first || now.Sub(old.first) < s.Settle {
			fresh++
			continue
		}
		if !old.counted {
			old.counted = true
			first[len(count)] = true
		}
		count = append(count, f)
	}
	s.seen = next
	return count, first, fresh
}
