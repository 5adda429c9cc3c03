package config

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Duration is a time.Duration that is written "30s".
type Duration time.Duration

// The kinds of settings, as flag.Value.
type (
	text    string
	boolean bool  // always with a value: "--runner true" and "--runner=true" are the same
	size    int64 // bytes; the suffixes K, M and G are powers of 1024
)

// list is separated by commas or given several times; together they replace
// what was configured before.
type list struct {
	at  *[]string
	set bool
}

func (t *text) String() string {
	if t == nil {
		return ""
	}
	return string(*t)
}

func (t *text) Set(s string) error {
	*t = text(s)
	return nil
}

func (l *list) String() string {
	if l == nil || l.at == nil {
		return ""
	}
	return strings.Join(*l.at, ",")
}

func (l *list) Set(s string) error {
	if !l.set {
		*l.at, l.set = nil, true
	}
	for _, e := range strings.Split(s, ",") {
		if e = strings.TrimSpace(e); e != "" {
			*l.at = append(*l.at, e)
		}
	}
	return nil
}

func (b *boolean) String() string {
	if b == nil {
		return "false"
	}
	return strconv.FormatBool(bool(*b))
}

func (b *boolean) Set(s string) error {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return fmt.Errorf("%q is neither true nor false", s)
	}
	*b = boolean(v)
	return nil
}

// UnmarshalText reads a duration as time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error { return d.Set(string(text)) }

// MarshalText writes a duration as UnmarshalText reads it.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String implements flag.Value.
func (d Duration) String() string { return time.Duration(d).String() }

// Set implements flag.Value.
func (d *Duration) Set(s string) error {
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is no duration: write 30s or 1m", s)
	}
	*d = Duration(v)
	return nil
}

func (n *size) String() string {
	if n == nil {
		return "0"
	}
	return strconv.FormatInt(int64(*n), 10)
}

func (n *size) Set(s string) error {
	digits := strings.TrimRight(s, "KMG")
	shift := map[string]uint{"": 0, "K": 10, "M": 20, "G": 30}
	by, known := shift[s[len(digits):]]
	v, err := strconv.ParseInt(digits, 10, 64)
	if !known || err != nil || v < 0 || v > (1<<62)>>by {
		return fmt.Errorf("%q is no size in bytes: write 16777216 or 16M", s)
	}
	*n = size(v << by)
	return nil
}
