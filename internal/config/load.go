package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Loaded is a configuration with the origin of each value by key ("network.pool"):
// "default", "file <path>" or "flag --<name>".
type Loaded struct {
	*Config
	Origin map[string]string
}

// Load reads the file over the defaults and then the flags (by key) over both.
// A missing file is an error unless optional.
func Load(file string, optional bool, flags map[string]string) (*Loaded, error) {
	l := &Loaded{Config: Default(), Origin: map[string]string{}}
	for _, f := range fields(reflect.ValueOf(l.Config).Elem(), "") {
		l.Origin[f.key] = "default"
	}
	b, err := os.ReadFile(file)
	switch {
	case err == nil:
		if err := l.decode(file, b); err != nil {
			return nil, err
		}
	case !optional || !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("config file: %w", err)
	}
	all := fields(reflect.ValueOf(l.Config).Elem(), "")
	for key, v := range flags {
		for _, f := range all {
			if f.key == key {
				f.value.SetString(v)
				l.Origin[key] = "flag --" + FlagName(key)
			}
		}
	}
	return l, l.Validate()
}

// FlagName is the flag of a key at the top level.
func FlagName(key string) string { return strings.ReplaceAll(key, "_", "-") }

func (l *Loaded) decode(file string, b []byte) error {
	err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(l.Config)
	var strict *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case errors.As(err, &strict):
		return l.unknown(file, strict)
	case errors.As(err, &bad):
		row, col := bad.Position()
		return fmt.Errorf("%s:%d:%d: %s: %w", file, row, col, strings.TrimPrefix(bad.Error(), "toml: "), errdefs.ErrInvalidArgument)
	case err != nil:
		return fmt.Errorf("%s: %w", file, err)
	}
	var set map[string]any
	if err := toml.Unmarshal(b, &set); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	l.mark(set, "", "file "+file)
	return nil
}

// mark notes the origin of all keys in a decoded table.
func (l *Loaded) mark(table map[string]any, prefix, origin string) {
	for k, v := range table {
		if sub, ok := v.(map[string]any); ok {
			l.mark(sub, prefix+k+".", origin)
			continue
		}
		l.Origin[prefix+k] = origin
	}
}

// unknown names each unknown key with its line and the nearest known key.
func (l *Loaded) unknown(file string, strict *toml.StrictMissingError) error {
	var errs []error
	for i := range strict.Errors {
		e := &strict.Errors[i]
		key := strings.Join(e.Key(), ".")
		row, _ := e.Position()
		hint := ""
		if n := l.nearest(key); n != "" {
			hint = fmt.Sprintf("; did you mean %q?", n)
		}
		errs = append(errs, fmt.Errorf("%s:%d: unknown key %q%s: %w", file, row, key, hint, errdefs.ErrInvalidArgument))
	}
	return errors.Join(errs...)
}

// nearest is the known key or table with the smallest edit distance to key, and
// "" when none is near enough to be a slip of the fingers.
func (l *Loaded) nearest(key string) string {
	best, near := "", max(2, len(key)/3)+1
	try := func(k string) {
		d := distance(key, k)
		if last := k[strings.LastIndexByte(k, '.')+1:]; k != last && key[strings.LastIndexByte(key, '.')+1:] == last {
			d = min(d, 1) // the right key in the wrong table
		}
		if d < near || d == near && best != "" && k < best {
			best, near = k, d
		}
	}
	if table, rest, ok := strings.Cut(key, "."); ok && table == "runtimes" {
		name, _, _ := strings.Cut(rest, ".")
		for _, f := range fields(reflect.ValueOf(External{}), table+"."+name+".") {
			try(f.key)
		}
	}
	for k := range l.Origin {
		try(k)
		if table, _, ok := strings.Cut(k, "."); ok {
			try(table)
		}
	}
	return best
}

// distance is the number of single-byte edits and swaps of neighbours between a and b.
func distance(a, b string) int {
	prev2, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}

// Write prints the configuration as a TOML file with the origin of each value
// beside it.
func (l *Loaded) Write(w io.Writer) error {
	table := ""
	for _, f := range fields(reflect.ValueOf(l.Config).Elem(), "") {
		name := f.key
		if i := strings.LastIndexByte(f.key, '.'); i >= 0 {
			t := f.key[:i]
			name = f.key[i+1:]
			if t != table {
				table = t
				if _, err := fmt.Fprintf(w, "\n[%s]\n", t); err != nil {
					return err
				}
			}
		}
		b, err := toml.Marshal(map[string]any{name: f.value.Interface()})
		if err != nil {
			return err
		}
		origin := l.Origin[f.key]
		if origin == "" { // a table of the file that does not set this one
			origin = "default"
		}
		if _, err := fmt.Fprintf(w, "%-52s # %s\n", strings.TrimSpace(string(b)), origin); err != nil {
			return err
		}
	}
	return nil
}

// Map is the configuration by key, for status output.
func (c *Config) Map() map[string]any {
	out := map[string]any{}
	for _, f := range fields(reflect.ValueOf(c).Elem(), "") {
		out[f.key] = f.value.Interface()
	}
	return out
}

type field struct {
	key   string
	value reflect.Value
}

// fields lists all values with their keys in the order of the struct: keys of
// the top level first, then table by table, tables with names of the operator's
// in the order of those.
func fields(v reflect.Value, prefix string) []field {
	var out []field
	for i := range v.NumField() {
		key := prefix + v.Type().Field(i).Tag.Get("toml")
		switch f := v.Field(i); {
		case f.Kind() == reflect.Struct && f.Type() != reflect.TypeFor[Duration]():
			out = append(out, fields(f, key+".")...)
		case f.Kind() == reflect.Map:
			names := f.MapKeys()
			slices.SortFunc(names, func(a, b reflect.Value) int { return strings.Compare(a.String(), b.String()) })
			for _, n := range names {
				out = append(out, fields(f.MapIndex(n), key+"."+n.String()+".")...)
			}
		default:
			out = append(out, field{key, f})
		}
	}
	return out
}
