package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/tatami-containers/tatami/host/class"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Schedule says whether classes of workload count where work queues.
type Schedule struct {
	// Enabled is false for everything in the order in which it comes.
	Enabled bool `toml:"enabled"`
	// Link is how much the node may receive at a time, as "10gbit"; measured when
	// empty.
	Link Rate `toml:"link"`
}

// Class is a class of workload. Those called online and batch are always there.
type Class struct {
	// Share is its weight among the classes that want something at the same time. The
	// class with the larger share is the more important one.
	Share int `toml:"share"`
	// Floor and Ceiling bound what it gets of the link; none when empty.
	Floor   Rate `toml:"floor"`
	Ceiling Rate `toml:"ceiling"`
	// Fill is "full" or "none": whether the rest of an image is fetched when its
	// container has started.
	Fill string `toml:"fill"`
	// Match says what is of this class, see class.ParseRule.
	Match []string `toml:"match"`
}

// Metrics says where Prometheus finds them.
type Metrics struct {
	// Address is an IP address with a port; no metrics when empty.
	Address string `toml:"address"`
}

// Rate is bytes a second, which are written "50MB" or "400mbit" in a file, or per
// cent of the link, "20%". Prefixes are powers of 1000, as those of networks are.
type Rate struct{ sched.Rate }

// rateUnits are bytes a second.
var rateUnits = map[string]float64{
	"bit": 1. / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8,
	"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9,
}

// maxRate is the most that a rate may be, in bytes a second.
const maxRate = 1e12

// UnmarshalText reads a rate.
func (r *Rate) UnmarshalText(text []byte) error {
	*r = Rate{}
	s := strings.ToLower(string(text))
	if s == "" {
		return nil
	}
	unit := strings.TrimLeft(s, "0123456789.")
	n, err := strconv.ParseFloat(strings.TrimSuffix(s, unit), 64)
	factor, known := rateUnits[unit]
	switch {
	case err == nil && unit == "%" && n > 0 && n <= 100:
		r.Percent = n
	case err == nil && known && n*factor >= 1 && n*factor <= maxRate:
		r.Bytes = int64(n * factor)
	default:
		return fmt.Errorf("%q is no rate: write bits a second as \"400mbit\", bytes a second as \"50MB\", or a part of the link as \"20%%\"", text)
	}
	return nil
}

// MarshalText writes a rate as UnmarshalText reads it.
func (r Rate) MarshalText() ([]byte, error) {
	switch {
	case r.Percent > 0:
		return []byte(strconv.FormatFloat(r.Percent, 'f', -1, 64) + "%"), nil
	case r.Bytes > 0:
		return []byte(strconv.FormatInt(r.Bytes, 10) + "B"), nil
	}
	return nil, nil
}

// defaultClasses are the classes of a node whose settings name none.
func defaultClasses() map[string]Class {
	return map[string]Class{
		class.Online: {Share: 95, Fill: "full"},
		class.Batch:  {Share: 5, Fill: "none"},
	}
}

// Bounds of classes.
const (
	maxClasses = 16
	maxShare   = 1000
	maxMatch   = 100 // rules of one class
	maxFloors  = 95  // per cent of the link, as package sched has it
)

var className = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// ClassNames lists the classes, the most important first.
func (c *Config) ClassNames() []string {
	names := slices.Collect(maps.Keys(c.Classes))
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(c.Classes[b].Share, c.Classes[a].Share), strings.Compare(a, b))
	})
	return names
}

// Rules are those by which the class of a container is chosen.
func (c *Config) Rules() (*class.Rules, error) {
	var classes []class.Class
	for _, name := range c.ClassNames() {
		classes = append(classes, class.Class{Name: name, Match: c.Classes[name].Match})
	}
	return class.New(classes, c.Class)
}

// Scheduling is what the settings say to package sched. A program that ends when nobody
// needs it any more fetches nothing that nobody has asked for.
func (c *Config) Scheduling() sched.Config {
	out := sched.Config{Default: c.Class, Link: c.Schedule.Link.Bytes, Off: !c.Schedule.Enabled}
	for _, name := range c.ClassNames() {
		s := c.Classes[name]
		out.Classes = append(out.Classes, sched.Class{
			Name: name, Share: s.Share, Floor: s.Floor.Rate, Ceiling: s.Ceiling.Rate, Fill: s.Fill == "full" && !c.IdleExit,
		})
	}
	return out
}

func (c *Config) checkClasses() error {
	if c.Schedule.Link.Percent > 0 {
		return fmt.Errorf("schedule.link is per cent: give a rate as \"10gbit\", or \"\" to have it measured")
	}
	if n := len(c.Classes); n > maxClasses {
		return fmt.Errorf("there are %d classes: give at most %d", n, maxClasses)
	}
	for _, name := range c.ClassNames() {
		if err := c.Classes[name].check(name, c.Schedule.Link.Bytes); err != nil {
			return fmt.Errorf("classes.%s: %w", name, err)
		}
	}
	if err := c.checkFloors(); err != nil {
		return err
	}
	if err := c.checkMatches(); err != nil {
		return err
	}
	_, err := c.Rules()
	return err
}

func (s Class) check(name string, link int64) error {
	switch {
	case !className.MatchString(name):
		return fmt.Errorf("name: give a lower-case letter, then lower-case letters, digits and \"-\"")
	case s.Share < 1 || s.Share > maxShare:
		return fmt.Errorf("share is %d: give 1 to %d", s.Share, maxShare)
	case s.Fill != "full" && s.Fill != "none":
		return fmt.Errorf("fill %q: give full or none", s.Fill)
	case len(s.Match) > maxMatch:
		return fmt.Errorf("match has %d rules: give at most %d", len(s.Match), maxMatch)
	}
	floor, ceiling := s.Floor, s.Ceiling
	if link > 0 {
		floor, ceiling = floor.of(link), ceiling.of(link)
	}
	if ceiling.Bytes > 0 && floor.Bytes > ceiling.Bytes || ceiling.Percent > 0 && floor.Percent > ceiling.Percent {
		return fmt.Errorf("floor is above ceiling: lower the floor, or leave out the ceiling")
	}
	return nil
}

// of is the rate in bytes on a link of so many bytes a second.
func (r Rate) of(link int64) Rate {
	if r.Percent > 0 {
		return Rate{sched.Rate{Bytes: int64(r.Percent / 100 * float64(link))}}
	}
	return r
}

// checkFloors refuses floors that no link can keep.
func (c *Config) checkFloors() error {
	var percent float64
	var bytes int64
	link := c.Schedule.Link.Bytes
	for _, s := range c.Classes {
		percent += s.Floor.Percent
		bytes += s.Floor.Bytes
	}
	if link > 0 {
		percent += 100 * float64(bytes) / float64(link)
	}
	if percent > maxFloors {
		return fmt.Errorf("the floors of all classes are %.0f%% of the link: lower them to %d%% at most", percent, maxFloors)
	}
	return nil
}

// checkMatches refuses a rule of two classes.
func (c *Config) checkMatches() error {
	of := map[string]string{}
	for _, name := range c.ClassNames() {
		for _, rule := range c.Classes[name].Match {
			if other, ok := of[rule]; ok && other != name {
				return fmt.Errorf("classes.%s and classes.%s both match %.64q: leave it with one of them", other, name, rule)
			}
			of[rule] = name
		}
	}
	return nil
}

func (m Metrics) check() error {
	if m.Address == "" {
		return nil
	}
	if at, err := netip.ParseAddrPort(m.Address); err != nil || at.Port() == 0 {
		return fmt.Errorf("metrics.address %q: give an IP address and a port, as \"127.0.0.1:9110\"", m.Address)
	}
	return nil
}
