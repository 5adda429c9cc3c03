package checknode

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// table is a decoded TOML table: values are string, int64, float64, bool, dates,
// []any or map[string]any.
type table = map[string]any

// Bounds of a settings file.
const (
	maxSettings = 1 << 20 // bytes
	maxDepth    = 32      // tables in tables; containerd's deepest has 6
)

// settings are tables of several files, merged, and which file each key is from.
type settings struct {
	root   table
	files  []string
	origin origin
}

// origin is the file that set a key last, and the same of the keys below it.
type origin struct {
	file string
	sub  map[string]*origin
}

func newSettings() *settings { return &settings{root: table{}, files: []string{}} }

// below returns the origin of a key, made when there is none.
func (o *origin) below(key string) *origin {
	if o.sub == nil {
		o.sub = map[string]*origin{}
	}
	if o.sub[key] == nil {
		o.sub[key] = &origin{}
	}
	return o.sub[key]
}

// parse decodes one file; the error has line and column.
func (t tree) parse(file string) (table, error) {
	text, err := t.read(file, maxSettings)
	if err != nil {
		return nil, err
	}
	out := table{}
	if err := toml.Unmarshal(text, &out); err != nil {
		var de *toml.DecodeError
		if errors.As(err, &de) {
			row, column := de.Position()
			return nil, fmt.Errorf("%s: line %d, column %d: %s: %w", file, row, column,
				strings.TrimPrefix(de.Error(), "toml: "), errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w: %w", file, err, errdefs.ErrInvalidArgument)
	}
	if deeper(out, maxDepth) {
		return nil, fmt.Errorf("%s: tables are nested more than %d deep: %w", file, maxDepth, errdefs.ErrInvalidArgument)
	}
	return out, nil
}

// deeper says whether tables are nested more than n deep.
func deeper(t table, n int) bool {
	for _, v := range t {
		if sub, ok := v.(table); ok && (n == 0 || deeper(sub, n-1)) {
			return true
		}
	}
	return false
}

// merge puts a file's tables over what is there: tables are merged, anything
// else is replaced.
func (s *settings) merge(file string, t table) {
	s.files = append(s.files, file)
	merge(s.root, &s.origin, file, t)
}

func merge(into table, o *origin, file string, from table) {
	for k, v := range from {
		below := o.below(k)
		below.file = file
		sub, ok := v.(table)
		if !ok {
			into[k] = v
			continue
		}
		old, ok := into[k].(table)
		if !ok {
			old = table{}
			into[k] = old
		}
		merge(old, below, file, sub)
	}
}

// drop forgets a table, which a file is about to replace.
func (s *settings) drop(keys ...string) {
	if t := s.table(keys[:len(keys)-1]...); t != nil {
		delete(t, keys[len(keys)-1])
	}
}

func (s *settings) value(keys ...string) any {
	t := s.table(keys[:len(keys)-1]...)
	return t[keys[len(keys)-1]]
}

// table is nil where there is none; a nil table can be read.
func (s *settings) table(keys ...string) table {
	t := s.root
	for _, k := range keys {
		t, _ = t[k].(table)
	}
	return t
}

func (s *settings) text(keys ...string) string {
	v, _ := s.value(keys...).(string)
	return v
}

// file says which file has a key, or "".
func (s *settings) file(keys ...string) string {
	if s.value(keys...) == nil {
		return ""
	}
	o := &s.origin
	for _, k := range keys {
		if o = o.sub[k]; o == nil {
			return "" // containerd's own
		}
	}
	return o.file
}

// texts are the strings of an array.
func texts(v any) []string {
	list, _ := v.([]any)
	out := []string{}
	for _, e := range list {
		if s, ok := e.(string); ok {
			out = append(out, s)
		}
	}
	return out
}
