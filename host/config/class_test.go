package config

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

func TestRate(t *testing.T) {
	for text, want := range map[string]sched.Rate{
		"": {}, "20%": {Percent: 20}, "0.5%": {Percent: .5}, "100%": {Percent: 100},
		"50MB": {Bytes: 50e6}, "1.2GB": {Bytes: 1.2e9}, "10gbit": {Bytes: 1.25e9}, "400Mbit": {Bytes: 50e6}, "8kbit": {Bytes: 1000}, "5B": {Bytes: 5},
	} {
		var r, again Rate
		if err := r.UnmarshalText([]byte(text)); err != nil || r.Rate != want {
			t.Errorf("%q: %+v, %v, want %+v", text, r, err, want)
		}
		out, err := r.MarshalText()
		if err == nil {
			err = again.UnmarshalText(out)
		}
		if err != nil || again != r {
			t.Errorf("%q: written %q, read %+v, %v", text, out, again, err)
		}
	}
	for _, text := range []string{"0%", "101%", "-1%", "%", "10", "10M", "10G", "1bit", "0MB", "MB", "1e3MB", "1TB", "9999999GB", "1.2.3MB", "1 MB", "nan%"} {
		var r Rate
		if err := r.UnmarshalText([]byte(text)); err == nil || !strings.Contains(err.Error(), "400mbit") {
			t.Errorf("%q: %+v, %v", text, r, err)
		}
	}
}

func TestClasses(t *testing.T) {
	for _, tc := range []struct{ name, text, err string }{
		{"defaults", "", ""},
		{"more", "[classes.mid]\nshare = 30\nfill = \"none\"", ""},
		{"default class", "class = \"mid\"\n[classes.mid]\nshare = 30\nfill = \"none\"", ""},
		{"floors by name", "[schedule]\nlink = \"1gbit\"\n[classes.batch]\nfloor = \"100mbit\"\nceiling = \"20%\"", ""},
		{"no such class", "class = \"mid\"", `class "mid": give one of online, batch`},
		{"name", "[classes.\"Mid 1\"]\nshare = 1\nfill = \"none\"", "classes.Mid 1: name"},
		{"no share", "[classes.mid]\nfill = \"none\"", "classes.mid: share is 0"},
		{"fill", "[classes.batch]\nfill = \"some\"", `classes.batch: fill "some"`},
		{"rate", "[classes.batch]\nfloor = \"10M\"", `"10M" is no rate`},
		{"floors", "[classes.batch]\nfloor = \"60%\"\n[classes.online]\nfloor = \"50%\"", "the floors of all classes are 110% of the link"},
		{"floors of a link", "[schedule]\nlink = \"1gbit\"\n[classes.batch]\nfloor = \"100MB\"\n[classes.online]\nfloor = \"50%\"", "130%"},
		{"ceiling", "[classes.batch]\nfloor = \"20%\"\nceiling = \"10%\"", "floor is above ceiling"},
		{"ceiling of a link", "[schedule]\nlink = \"1gbit\"\n[classes.batch]\nfloor = \"20%\"\nceiling = \"1MB\"", "floor is above ceiling"},
		{"link", "[schedule]\nlink = \"50%\"", "schedule.link is per cent"},
		{"rule", "[classes.batch]\nmatch = [\"BE\"]", `match of class batch: "BE": give KEY=VALUE`},
		{"QoS", "[classes.batch]\nmatch = [\"qos=BE\"]", "give one of Guaranteed, Burstable, BestEffort"},
		{"one rule of two", "[classes.batch]\nmatch = [\"a=b\"]\n[classes.online]\nmatch = [\"a=b\"]", "classes.online and classes.batch both match"},
		{"unknown key", "[classes.batch]\nweight = 1", "unknown key classes.batch.weight"},
		{"metrics", "[metrics]\naddress = \"localhost:9110\"", "metrics.address"},
		{"metrics without a port", "[metrics]\naddress = \"127.0.0.1\"", "metrics.address"},
		{"metrics everywhere", "[metrics]\naddress = \"[::]:9110\"", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Decode([]byte("version = 1\n" + tc.text))
			if err == nil {
				err = c.check()
			}
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want one with %q", err, tc.err)
			}
		})
	}
	c := Default()
	for i := range maxClasses {
		c.Classes[fmt.Sprintf("c%d", i)] = Class{Share: 1, Fill: "none"}
	}
	if err := c.check(); err == nil || !strings.Contains(err.Error(), "at most 16") {
		t.Errorf("%d classes: %v", len(c.Classes), err)
	}
}

// A table of a class changes only what it names, and the larger share comes first.
func TestScheduling(t *testing.T) {
	c, err := Decode([]byte("version = 1\nclass = \"batch\"\n[schedule]\nlink = \"8mbit\"\n[classes.batch]\nceiling = \"10%\"\n[classes.mid]\nshare = 40\nfill = \"full\"\n"))
	if err == nil {
		err = c.check()
	}
	want := sched.Config{Default: "batch", Link: 1e6, Classes: []sched.Class{
		{Name: "online", Share: 95, Fill: true}, {Name: "mid", Share: 40, Fill: true}, {Name: "batch", Share: 5, Ceiling: sched.Rate{Percent: 10}},
	}}
	if got := c.Scheduling(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}
