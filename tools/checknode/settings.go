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

// settings are tables of several files, merged, and which file each key is from.
type settings struct {
	root   table
	files  []string
	origin map[string]string // by joined key
}

func newSettings() *settings { return &settings{root: table{}, origin: map[string]string{}} }

// joined is a key of origin.
func joined(keys []string) string { return strings.Join(keys, "\x00") }

// parse decodes one file; the error has line and column.
func (t tree) parse(file string) (table, error) {
	text, err := t.read(file)
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
	return out, nil
}

// merge puts a file's tables over what is there: tables are merged, anything
// else is replaced.
func (s *settings) merge(file string, t table) {
	s.files = append(s.files, file)
	s.mergeAt(s.root, nil, file, t)
}

func (s *settings) mergeAt(into table, at []string, file string, from table) {
	for k, v := range from {
		keys := append(at[:len(at):len(at)], k)
		s.origin[joined(keys)] = file
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
		s.mergeAt(old, keys, file, sub)
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
	return s.origin[joined(keys)]
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
