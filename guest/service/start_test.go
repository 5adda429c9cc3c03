package service

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestWaitUntilReady(t *testing.T) {
	for _, tc := range []struct {
		name  string
		reads []time.Duration // after the mount
		gone  time.Duration   // after the mount; 0: never
		told  time.Duration   // after the mount that it is ready; 0: never
		want  time.Duration
	}{
		{name: "reads nothing at all", want: 30 * time.Second},
		{name: "begins late", reads: []time.Duration{12 * time.Second}, want: 17 * time.Second},
		{name: "pauses", reads: []time.Duration{time.Second, 5500 * time.Millisecond}, want: 11 * time.Second},
		{name: "reads on and on", reads: []time.Duration{4e9, 8e9, 12e9, 16e9, 20e9, 24e9, 28e9, 32e9}, want: 30 * time.Second},
		{name: "is gone", reads: []time.Duration{time.Second}, gone: 1500 * time.Millisecond, want: 1500 * time.Millisecond},
		{name: "is ready", reads: []time.Duration{time.Second}, told: 3 * time.Second, want: 3 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				from := time.Now()
				last := func() (at time.Time) {
					for _, r := range tc.reads {
						if time.Since(from) >= r {
							at = from.Add(r)
						}
					}
					return at
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if tc.gone > 0 {
					time.AfterFunc(tc.gone, cancel)
				}
				told := make(chan struct{})
				if tc.told > 0 {
					time.AfterFunc(tc.told, func() { close(told) })
				}
				waitUntilReady(ctx, 30*time.Second, last, told)
				if got := time.Since(from); got != tc.want {
					t.Errorf("ready after %v, want %v", got, tc.want)
				}
			})
		})
	}
}
