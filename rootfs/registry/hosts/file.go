package hosts

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// file is a hosts.toml.
type file struct {
	settings
	// Server is the last host that is asked.
	Server string              `toml:"server"`
	Hosts  map[string]settings `toml:"host"`

	order   []string // keys of Hosts as the file has them
	unknown []string // keys that nobody knows
}

// settings are those of one host.
type settings struct {
	Capabilities []string `toml:"capabilities"`
	// CA is a path or a list of paths.
	CA any `toml:"ca"`
	// Client is a path, a list of paths, or a list of pairs: certificate and key.
	Client     any   `toml:"client"`
	SkipVerify *bool `toml:"skip_verify"`
	// Header has a text or a list of texts for each name.
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// empty tells whether nothing is set.
func (s settings) empty() bool {
	return len(s.Capabilities) == 0 && s.CA == nil && s.Client == nil && s.SkipVerify == nil &&
		len(s.Header) == 0 && !s.OverridePath && s.DialTimeout == ""
}

// parse reads the text of a hosts.toml. It does not look at what the values mean.
func parse(text []byte) (*file, error) {
	f := &file{}
	if err := toml.Unmarshal(text, f); err != nil {
		return nil, explain(err)
	}
	if err := f.walk(text); err != nil {
		return nil, explain(err)
	}
	for name := range f.Hosts {
		if !slices.Contains(f.order, name) {
			// containerd does not see them: it looks for tables.
			f.notKnown(fmt.Sprintf("host.%q (write a table: [host.%q])", name, name))
		}
	}
	slices.Sort(f.unknown)
	return f, nil
}

// explain gives the place of a mistake without the text around it, which may be
// a secret header.
func explain(err error) error {
	var de *toml.DecodeError
	if errors.As(err, &de) {
		row, column := de.Position()
		return fmt.Errorf("line %d, column %d: %s", row, column, strings.TrimPrefix(de.Error(), "toml: "))
	}
	return err
}

// maxHosts bounds the hosts of one registry, and maxUnknown the keys that are told.
const (
	maxHosts   = 256
	maxUnknown = 16
)

// walk finds what decoding into a struct does not keep: the order of the tables
// [host."name"], and keys that nobody knows. The decoder's own way to tell of the
// latter takes a time that grows with the square of their number.
func (f *file) walk(text []byte) error {
	var p unstable.Parser
	p.Reset(text)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		key := []string{}
		if e.Kind == unstable.KeyValue {
			key = slices.Clone(table)
		}
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		if e.Kind != unstable.KeyValue {
			table = key
		}
		if e.Kind == unstable.Table && len(key) >= 2 && key[0] == "host" && !slices.Contains(f.order, key[1]) {
			if len(f.order) == maxHosts {
				return fmt.Errorf("more than %d hosts", maxHosts)
			}
			f.order = append(f.order, key[1])
		}
		if !known(key) && (e.Kind != unstable.KeyValue || known(table)) {
			f.notKnown(strings.Join(key, "."))
		}
	}
	return p.Error()
}

func (f *file) notKnown(key string) {
	if len(f.unknown) < maxUnknown {
		f.unknown = append(f.unknown, key)
	}
}

// known tells whether a key, or a table, means something. Like the decoder it
// takes any case.
func known(key []string) bool {
	if len(key) > 0 && strings.EqualFold(key[0], "host") {
		if len(key) <= 2 {
			return true
		}
		key = key[2:]
	} else if len(key) == 1 && strings.EqualFold(key[0], "server") {
		return true
	}
	if len(key) == 0 {
		return true
	}
	switch strings.ToLower(key[0]) {
	case "capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout":
		return true
	}
	return false
}

// texts is a value that may be one text or a list of them.
func texts(key string, v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		list := make([]string, 0, len(v))
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%s: give texts, not %T", key, e)
			}
			list = append(list, s)
		}
		return list, nil
	}
	return nil, fmt.Errorf("%s: give a text or a list of texts, not %T", key, v)
}

// pair is the files of a client certificate; key is "" when they are one file.
type pair struct{ cert, key string }

// pairs reads the value of client.
func pairs(v any) ([]pair, error) {
	list, ok := v.([]any)
	if !ok {
		one, err := texts("client", v)
		if err != nil || len(one) == 0 {
			return nil, err
		}
		return []pair{{cert: one[0]}}, nil
	}
	var out []pair
	for _, e := range list {
		p, err := texts("client", e)
		_, single := e.(string)
		switch {
		case err != nil:
			return nil, err
		case single:
			out = append(out, pair{cert: p[0]})
		case len(p) == 2:
			out = append(out, pair{cert: p[0], key: p[1]})
		default:
			return nil, errors.New("client: a pair is [certificate, key]")
		}
	}
	return out, nil
}

func (s settings) dialTimeout() (time.Duration, error) {
	if s.DialTimeout == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(s.DialTimeout)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("dial_timeout %q: write \"1s\"", s.DialTimeout)
	}
	return d, nil
}
