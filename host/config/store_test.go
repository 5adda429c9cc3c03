package config

import (
	"strings"
	"testing"
)

func TestStore(t *testing.T) {
	const disk = 1000 << 30
	for _, tc := range []struct {
		text string
		want int64
		err  string
	}{
		{text: ``, want: disk / 100 * 75},
		{text: `size = "80%"`, want: disk / 100 * 80},
		{text: `size = "200G"`, want: 200 << 30},
		{text: `size = "0"`},
		{text: `size = "2T"` + "\nhigh = 100\nlow = 100", want: 2 << 40},
		{text: `size = "0%"`, err: `store.size "0%"`},
		{text: `size = "101%"`, err: "1% to 100%"},
		{text: `size = "x%"`, err: `store.size "x%"`},
		{text: `size = ""`, err: "store.size"},
		{text: `size = "-1G"`, err: "store.size"},
		{text: `size = "1X"`, err: `a share of the disk as "75%"`},
		{text: "low = 96", err: "low not above high"},
		{text: "low = 0", err: "store.low is 0"},
		{text: "high = 101", err: "store.high is 101"},
		{text: `pinned = [""]`, err: "store.pinned"},
		{text: `pinned = ["a b"]`, err: `store.pinned "a b"`},
		{text: `pinned = ["` + strings.Repeat(`a","`, maxPinned) + `b"]`, err: "at most 1000"},
	} {
		c, err := Decode([]byte("version = 1\n[store]\n" + tc.text))
		if err != nil {
			t.Fatal(err)
		}
		err = c.check()
		if tc.err != "" || err != nil {
			if err == nil || tc.err == "" || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%.40s: error %v, want one with %q", tc.text, err, tc.err)
			}
			continue
		}
		if got, err := c.Store.Bytes(disk); got != tc.want || err != nil {
			t.Errorf("%s: %d bytes, %v, want %d", tc.text, got, err, tc.want)
		}
	}
}
