package builtin

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/internal/id"
	"k8s.io/klog/v2"
)

// record is what must be known of an attached pod after a restart of the
// daemon. One file per pod, written before Attach returns and without sync: it
// says nothing that outlives the boot.
type record struct {
	Version int          `json:"version"`
	Pod     id.Pod       `json:"pod"`
	Name    string       `json:"name"` // namespace/name, for people
	Link    string       `json:"link"`
	IPs     []netip.Addr `json:"ips"`
	Ports   []mapping    `json:"ports,omitempty"`

	attaching bool // guarded by Network.mu: Attach has not returned yet
}

const recordVersion = 1

// store keeps the records below dir.
type store struct{ dir string }

// openStore opens the records of this boot and discards those of an earlier one.
func openStore(dir string) (*store, error) {
	s := &store{dir: dir}
	same := s.sameBoot()
	if !same {
		if err := os.RemoveAll(s.pods()); err != nil {
			return nil, fmt.Errorf("discard records of an earlier boot: %w", err)
		}
	}
	if err := os.MkdirAll(s.pods(), 0o700); err != nil {
		return nil, err
	}
	// Torn records are looked for with the records.
	if err := durable.Clean(dir); err != nil {
		klog.ErrorS(err, "Writes of the network's state that were cut short are not removed")
	}
	if same { // nothing to write: a full disk must not keep the daemon down
		return s, nil
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read boot id: %w", err)
	}
	return s, durable.WriteFile(filepath.Join(dir, "boot_id"), boot, 0o600, false)
}

func (s *store) pods() string         { return filepath.Join(s.dir, "pods") }
func (s *store) path(p id.Pod) string { return filepath.Join(s.pods(), string(p)+".json") }
func (s *store) podCIDRPath() string  { return filepath.Join(s.dir, "pod_cidr") }
func (s *store) remove(p id.Pod) error {
	if err := os.Remove(s.path(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network record: %w", err)
	}
	return nil
}

func (s *store) write(r *record) error {
	b, err := durable.Seal(r)
	if err == nil {
		err = os.MkdirAll(s.pods(), 0o700) // the state folder may have been wiped
	}
	if err == nil {
		err = durable.WriteFile(s.path(r.Pod), b, 0o600, false)
	}
	if err != nil {
		return fmt.Errorf("network record: %w", err)
	}
	return nil
}

// contents is what the store's folder holds.
type contents struct {
	records []*record
	damaged []string // records that cannot be read
	aside   []string // such as an earlier daemon moved aside
	torn    []string // left by a crash inside WriteFile
}

// read reads the folder and changes nothing.
func (s *store) read() (c contents, err error) {
	entries, err := os.ReadDir(s.pods())
	if err != nil {
		return c, err
	}
	for _, e := range entries {
		path := filepath.Join(s.pods(), e.Name())
		name, isRecord := strings.CutSuffix(e.Name(), ".json")
		switch {
		case isRecord && id.Valid(name) == nil:
		case strings.HasPrefix(e.Name(), "."):
			c.torn = append(c.torn, path)
			continue
		case strings.HasSuffix(e.Name(), ".json.bad"):
			c.aside = append(c.aside, path)
			continue
		default:
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return c, err
		}
		r, err := parseRecord(b, id.Pod(name))
		if err != nil {
			klog.ErrorS(err, "Network record is unreadable", "path", path)
			c.damaged = append(c.damaged, path)
			continue
		}
		c.records = append(c.records, r)
	}
	return c, nil
}

// load returns all records. A file that does not parse is moved aside: its
// pod's link still guards its address.
func (s *store) load() ([]*record, error) {
	c, err := s.read()
	if err != nil {
		return nil, err
	}
	for _, path := range c.torn {
		_ = os.Remove(path)
	}
	for _, path := range c.damaged {
		if err := os.Rename(path, path+".bad"); err != nil {
			return nil, err
		}
	}
	return c.records, nil
}

func parseRecord(b []byte, pod id.Pod) (*record, error) {
	var r record
	// Pods run on across an upgrade: their records may have no checksum.
	if err := durable.UnsealOld(b, &r); err != nil {
		return nil, err
	}
	return &r, r.check(pod)
}

// check says what in a record is not what this version writes for the pod.
func (r *record) check(pod id.Pod) error {
	if r.Version != recordVersion || r.Pod != pod || r.Link == "" || len(r.IPs) == 0 || len(r.IPs) > 2 {
		return fmt.Errorf("network record of pod %s: version %d, link %q, addresses %v are not what version %d writes", id.Short(pod), r.Version, r.Link, r.IPs, recordVersion)
	}
	for _, ip := range r.IPs {
		if !ip.IsValid() {
			return errors.New("network record: invalid address")
		}
	}
	for _, m := range r.Ports {
		if !m.Pod.IsValid() || m.HostIP.IsValid() && m.HostIP.Is4() != m.Pod.Is4() {
			return errors.New("network record: invalid port mapping")
		}
	}
	return nil
}
