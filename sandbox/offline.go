package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/sandbox/journal"
	"github.com/berth-runtime/berth/sandbox/leftovers"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// Offline is a node whose daemon does not run.
type Offline struct {
	Root, State string // as in Config
	// Supervisor is nil when none runs.
	Supervisor leftovers.Supervisor
	// Network and Images look for their own.
	Network func(use cni.InUse) ([]leftover.Finding, error)
	Images  func(used func(image string) bool) ([]leftover.Finding, error)
}

// offline is what is on record.
type offline struct {
	bootID     string
	pods       map[id.Pod]podRecord
	containers map[id.Container]containerRecord // and, with an ID alone, the first processes of pods
	unreadable map[string]bool                  // ids: what they have is left alone
	images     map[string]bool
	out        []leftover.Finding
}

// Leftovers looks for what the reconciler of a running daemon looks for, and changes
// nothing. What a daemon will take up or down at its start is on record, and no leftover.
func (o Offline) Leftovers(ctx context.Context) ([]leftover.Finding, error) {
	if err := checkRoot(o.Root, o.State); err != nil {
		return nil, err
	}
	bootID, err := readBootID()
	if err != nil {
		return nil, err
	}
	r := &offline{bootID: bootID, pods: map[id.Pod]podRecord{}, containers: map[id.Container]containerRecord{}, unreadable: map[string]bool{}, images: map[string]bool{}}
	if err := r.read(o.Root); err != nil {
		return nil, err
	}
	cgroups, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	past, err := leftovers.ReadPast(filepath.Join(o.State, leftovers.PastFile))
	if err != nil {
		return nil, err
	}
	found, err := leftovers.Look(ctx, places(o.Root, o.State, cgroups, past, o.Supervisor), r.records())
	for i := range found { // the first process of a pod is on its record only
		if f := &found[i]; f.Kind == leftover.Container && len(r.unreadable) > 0 {
			f.Remove, f.Remedy = nil, "a record that cannot be read may be of it: start berthd"
		}
	}
	errs := []error{err}
	network, err := o.Network(cni.InUse{Pod: r.usesNetwork, IPs: r.addresses})
	if err != nil {
		errs = append(errs, fmt.Errorf("network: %w", err))
	}
	images, err := o.Images(func(image string) bool { return r.images[image] || len(r.unreadable) > 0 })
	if err != nil {
		errs = append(errs, fmt.Errorf("images: %w", err))
	}
	found = slices.Concat(r.out, found, network, images)
	leftover.Sort(found)
	return found, errors.Join(errs...)
}

func readBootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// read reads the records of pods and containers.
func (r *offline) read(root string) error {
	look := func(book string, each func(body []byte) error) error {
		dir := filepath.Join(recordsDir(root), book)
		return journal.Look(dir, func(key string, body []byte, err error) {
			if errors.Is(err, journal.ErrAside) {
				r.unreadable[strings.TrimSuffix(key, ".json.bad")] = true
				return // reported among the rest
			}
			if err == nil {
				err = each(body)
			}
			if err != nil {
				r.unreadable[key] = true
				r.out = append(r.out, leftovers.Aside(filepath.Join(dir, key+".json"), err.Error()))
			}
		})
	}
	err := look("pods", func(body []byte) error {
		rec, err := decodePod(body)
		if err == nil {
			r.pods[rec.ID] = rec
			if rec.Init != "" {
				r.containers[rec.Init] = containerRecord{ID: rec.Init}
			}
		}
		return err
	})
	return errors.Join(err, look("containers", func(body []byte) error {
		rec, err := decodeContainer(body)
		if err == nil {
			r.containers[rec.ID] = rec
			r.images[rec.ImageID] = true
			for _, m := range rec.Config.Mounts {
				r.images[m.Image], r.images[m.ImageRef] = true, true
			}
		}
		return err
	}))
}

func (r *offline) records() leftovers.Records {
	pod := func(p id.Pod) bool { _, ok := r.pods[p]; return ok || r.unreadable[string(p)] }
	container := func(c id.Container) bool { _, ok := r.containers[c]; return ok || r.unreadable[string(c)] }
	return leftovers.Records{
		Pod: pod, Container: container,
		Containers: func() map[id.Container]bool {
			out := map[id.Container]bool{}
			for c := range r.containers {
				out[c] = true
			}
			for c := range r.unreadable {
				out[id.Container(c)] = true
			}
			return out
		},
		Ended: func(c id.Container) bool { return r.containers[c].State == lifecycle.Exited },
		Keeps: func(key string) bool {
			owner, name, _ := strings.Cut(key, "/")
			return pod(id.Pod(owner)) || !slices.Contains(heldNames, name)
		},
		Running: func() (out []leftovers.Running) {
			for _, c := range r.containers {
				if c.State == lifecycle.Running && c.BootID == r.bootID {
					out = append(out, leftovers.Running{ID: c.ID, Pid: c.Pid, Cgroup: c.Cgroup})
				}
			}
			return out
		},
		Logs: func() (out []string) {
			for _, c := range r.containers {
				if c.LogPath != "" {
					out = append(out, c.LogPath)
				}
			}
			return out
		},
	}
}

func (r *offline) usesNetwork(p id.Pod) bool {
	rec, ok := r.pods[p]
	return r.unreadable[string(p)] || ok && (rec.State != lifecycle.NotReady || rec.Init != "" || rec.Attachment.Network != "")
}

func (r *offline) addresses() (out []netip.Addr) {
	for p, rec := range r.pods {
		if r.usesNetwork(p) {
			out = append(out, rec.Attachment.IPs...)
		}
	}
	return out
}
