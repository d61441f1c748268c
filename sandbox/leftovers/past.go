package leftovers

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/internal/id"
)

// PastFile is the name of the file of a Past in the state folder: it dies with the
// boot, as cgroups do.
const PastFile = "past"

// Object is a pod or container whose record was removed.
type Object struct {
	At     time.Time
	ID     string
	Cgroup string // of its own: the last element is the id
}

// Past remembers, on disk and across daemons, the cgroups of forgotten pods and
// containers until they are seen to be gone in every hierarchy. It is the proof that
// a cgroup which is still there is Berth's. Its methods may be called concurrently.
type Past struct {
	path string

	mu      sync.Mutex
	file    *os.File // guarded by mu; nil: read only
	objects []Object // guarded by mu
	lines   int      // guarded by mu; in the file
}

// maxLines is when a file that is mostly of objects seen to be gone is written anew.
const maxLines = 1024

// OpenPast opens the file at path, which is made if missing.
func OpenPast(path string) (*Past, error) {
	p, err := ReadPast(path)
	if err != nil {
		return nil, err
	}
	return p, p.open()
}

// ReadPast reads the file at path and never writes it.
func ReadPast(file string) (*Past, error) {
	p := &Past{path: file}
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("removed records: %w", err)
	}
	for line := range bytes.Lines(b) {
		p.lines++
		if o, ok := parseObject(string(line)); ok { // else cut short by a crash: nothing was removed yet
			p.objects = append(p.objects, o)
		}
	}
	return p, nil
}

func (p *Past) open() (err error) {
	if p.file, err = os.OpenFile(p.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600); err != nil {
		return fmt.Errorf("removed records: %w", err)
	}
	return nil
}

// Close closes the file.
func (p *Past) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.file == nil {
		return nil
	}
	return p.file.Close()
}

// line begins with a newline, which ends one that was cut short.
func (o Object) line() string { return fmt.Sprintf("\n%d %s %s.", o.At.Unix(), o.ID, o.Cgroup) }

func parseObject(line string) (o Object, ok bool) {
	line, whole := strings.CutSuffix(strings.TrimSuffix(line, "\n"), ".")
	f := strings.SplitN(line, " ", 3)
	if !whole || len(f) != 3 {
		return o, false
	}
	at, err := strconv.ParseInt(f[0], 10, 64)
	o = Object{At: time.Unix(at, 0), ID: f[1], Cgroup: f[2]}
	return o, err == nil && o.valid()
}

// valid: the cgroup is the object's own, and not one that others may be in.
func (o Object) valid() bool {
	return id.Valid(o.ID) == nil && path.IsAbs(o.Cgroup) && path.Clean(o.Cgroup) == o.Cgroup && path.Base(o.Cgroup) == o.ID
}

// Add is called before the record of an object is removed. An object without a cgroup
// of its own is not remembered.
func (p *Past) Add(name, cgroup string) error {
	o := Object{At: time.Now().Truncate(time.Second), ID: name, Cgroup: cgroup}
	if !o.valid() {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.objects = append(p.objects, o)
	p.lines++
	if _, err := p.file.WriteString(o.line()); err != nil {
		return fmt.Errorf("removed records: %w", err)
	}
	return nil
}

// List returns the objects.
func (p *Past) List() []Object {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.objects)
}

// Drop forgets objects whose cgroups are gone.
func (p *Past) Drop(gone map[Object]bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(gone) == 0 || p.file == nil {
		return nil
	}
	p.objects = slices.DeleteFunc(p.objects, func(o Object) bool { return gone[o] })
	var err error
	switch {
	case len(p.objects) == 0:
		err = p.file.Truncate(0)
	case p.lines < maxLines || p.lines < 2*len(p.objects):
		return nil
	default:
		var b strings.Builder
		for _, o := range p.objects {
			b.WriteString(o.line())
		}
		if err = durable.WriteFile(p.path, []byte(b.String()), 0o600, false); err == nil {
			err = errors.Join(p.file.Close(), p.open())
		}
	}
	if err != nil {
		return fmt.Errorf("removed records: %w", err)
	}
	p.lines = len(p.objects)
	return nil
}
