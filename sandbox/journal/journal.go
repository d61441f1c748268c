// Package journal keeps one record file per pod sandbox and per container. Each
// Write adds one line of versioned and checksummed JSON; the last line counts.
//
// A file that is replaced at each change would cost an inode made and an inode
// deleted each time, and ext4 does not use an inode again for minutes but looks
// at it for each file that it makes meanwhile: on a node where pods come and go
// that is dearer than all else on the pod path. Replacing a file also makes ext4
// write its data out at once. A long file is replaced by its last line.
//
// Records live below the daemon's root folder and not on the tmpfs of its state
// folder: after a reboot the network's DEL must still be called for each pod.
// They are not synced: they die with the boot, so they must be whole, not
// durable. A last line that was cut short belongs to a Write that never returned:
// the line before it counts, since nothing is done before it is on record. A
// record that is broken otherwise is moved aside, reported, and costs only its
// own pod or container.
package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/internal/id"
)

// Version of the record format. Readers ignore fields that they do not know.
const Version = 1

// envelope is one line of a record file.
type envelope struct {
	Version int             `json:"version"`
	Sum     string          `json:"sha256"`
	Body    json.RawMessage `json:"body"`
}

// Book is a folder of records of one kind.
type Book struct{ dir string }

// Open opens (and makes) the folder.
func Open(dir string) (*Book, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &Book{dir: dir}, nil
}

func (b *Book) path(key string) string { return filepath.Join(b.dir, key+".json") }

// maxSize is when a file is replaced by its last line, in bytes.
const maxSize = 64 << 10

// Write makes v the record of key, which must be an id. Writes of one key must
// not overlap.
func (b *Book) Write(key string, v any) error {
	if err := id.Valid(key); err != nil {
		return err
	}
	line, err := encode(v)
	if err == nil {
		err = b.add(b.path(key), line)
	}
	if err != nil {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	return nil
}

// encode makes an envelope with a newline before it: that ends a line which was
// cut short. It is put together by hand, for the body is JSON already.
func encode(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body)
	line := make([]byte, 0, len(body)+128)
	line = fmt.Appendf(line, "\n{\"version\":%d,\"sha256\":\"%x\",\"body\":", Version, sum)
	return append(append(line, body...), '}'), nil
}

func (b *Book) add(path string, line []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() > 0 && st.Size()+int64(len(line)) > maxSize {
		return durable.WriteFile(path, line, 0o600, false)
	}
	crashpoint.Here("journal", "opened")
	if _, err := f.Write(line); err != nil {
		if st.Size() == 0 { // a first one, of something that is not made then
			return errors.Join(err, os.Remove(path))
		}
		// What is there of the line must not count later, should it be whole.
		return errors.Join(err, f.Truncate(st.Size()))
	}
	return nil
}

// Remove drops the record of key; a missing one is success.
func (b *Book) Remove(key string) error {
	if err := id.Valid(key); err != nil {
		return err
	}
	if err := os.Remove(b.path(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	return nil
}

// Load calls f with each record, in no order. A record that cannot be read is
// renamed to <key>.json.bad and its error returned among the others; f's errors
// count the same. When the folder cannot be read, or descriptors or memory are
// short, Load ends with ErrUnread: what is whole must not count as lost.
func (b *Book) Load(f func(key string, body []byte) error) error {
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return fmt.Errorf("journal: %w: %w", err, ErrUnread)
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		key, ok := strings.CutSuffix(name, ".json")
		if !ok {
			if strings.Contains(name, ".tmp-") { // a write that a crash cut short
				errs = append(errs, os.Remove(filepath.Join(b.dir, name)))
			}
			continue
		}
		body, err := b.read(key)
		if errors.Is(err, errNever) {
			errs = append(errs, os.Remove(b.path(key)))
			continue
		}
		if durable.IsShort(err) {
			return errors.Join(append(errs, fmt.Errorf("journal %s: %w: %w", key, err, ErrUnread))...)
		}
		if err == nil {
			err = f(key, body)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("journal %s: set aside as %s.bad: %w", key, name, err),
				os.Rename(b.path(key), b.path(key)+".bad"))
		}
	}
	return errors.Join(errs...)
}

// ErrUnread is the error of a Load that did not see all records.
var ErrUnread = errors.New("not all records were read")

// Look calls f with each record in dir, in no order, and changes nothing: with the
// error of one that cannot be read, and with ErrAside and the file's name as the key
// for one that Load has moved aside. A missing folder has no records.
func Look(dir string, f func(key string, body []byte, err error)) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	b := &Book{dir: dir}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".json.bad") {
			f(e.Name(), nil, ErrAside)
		}
		key, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		body, err := b.read(key)
		if errors.Is(err, errNever) || errors.Is(err, fs.ErrNotExist) {
			continue // nothing was done for it, or it is gone already
		}
		f(key, body, err)
	}
	return nil
}

// ErrAside is a record that was moved aside because it could not be read.
var ErrAside = errors.New("set aside by a daemon that could not read it")

func (b *Book) read(key string) ([]byte, error) {
	if err := id.Valid(key); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(b.path(key))
	if err != nil {
		return nil, err
	}
	return last(data)
}

// errNever is a file without a whole line: the daemon was killed in the first
// Write of its key, before anything was done for it.
var errNever = errors.New("first write was cut short")

// last finds the newest record in a file.
func last(data []byte) ([]byte, error) {
	torn := errNever
	for {
		i := bytes.LastIndexByte(data, '\n')
		line := data[i+1:]
		if len(line) > 0 {
			body, err := decode(line)
			var cut *json.SyntaxError
			if !errors.As(err, &cut) {
				return body, err
			}
			if int(cut.Offset) < len(line) { // damaged, not cut short
				torn = err
			}
		}
		if i < 0 {
			return nil, fmt.Errorf("%w: %w", torn, errdefs.ErrDataLoss)
		}
		data = data[:i]
	}
}

// decode reads one line. Its error is a json.SyntaxError for one that was cut short.
func decode(line []byte) ([]byte, error) {
	var e envelope
	if err := json.Unmarshal(line, &e); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if e.Version < 1 || e.Version > Version {
		return nil, fmt.Errorf("record version %d is not known to this daemon: %w", e.Version, errdefs.ErrDataLoss)
	}
	if sum := sha256.Sum256(e.Body); hex.EncodeToString(sum[:]) != e.Sum {
		return nil, fmt.Errorf("checksum differs: %w", errdefs.ErrDataLoss)
	}
	return e.Body, nil
}
