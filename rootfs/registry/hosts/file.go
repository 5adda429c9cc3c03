package hosts

import (
	"bytes"
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

// parse reads the text of a hosts.toml. It does not look at what the values mean.
func parse(text []byte) (*file, error) {
	f := &file{}
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(f)
	var missing *toml.StrictMissingError
	switch {
	case errors.As(err, &missing): // all the rest was decoded
		for _, e := range missing.Errors {
			f.unknown = append(f.unknown, strings.Join(e.Key(), "."))
		}
	case err != nil:
		return nil, explain(err)
	}
	if f.order, err = order(text); err != nil {
		return nil, err
	}
	for name := range f.Hosts {
		if !slices.Contains(f.order, name) {
			// containerd does not see them: it looks for tables.
			f.unknown = append(f.unknown, fmt.Sprintf("host.%q (write a table: [host.%q])", name, name))
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

// order returns the names of the tables [host."name"] as they appear, which a
// map does not keep.
func order(text []byte) ([]string, error) {
	var names []string
	var p unstable.Parser
	p.Reset(text)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table {
			continue
		}
		var key []string
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		if len(key) >= 2 && key[0] == "host" && !slices.Contains(names, key[1]) {
			names = append(names, key[1])
		}
	}
	return names, p.Error()
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
