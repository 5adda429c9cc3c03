package config

import (
	"fmt"
	"time"
)

// Profile says what is done about what starts of images read.
type Profile struct {
	// Record is how long it is noted what a container reads when it starts; "0s"
	// notes nothing.
	Record Duration `toml:"record"`
	// Push publishes a profile of several starts beside its image.
	Push bool `toml:"push"`
	// Budget is how many bytes a guest may have fetched ahead of its reads.
	Budget Size `toml:"budget"`
}

// Bounds of settings.
const (
	maxRecord = 10 * time.Minute
	maxBudget = 1 << 30
)

func (p Profile) check() error {
	if r := time.Duration(p.Record); r != 0 && (r < time.Second || r > maxRecord) {
		return fmt.Errorf("profile.record is %s: give 1s to %s, or 0s for none", r, maxRecord)
	}
	if p.Budget > maxBudget {
		return fmt.Errorf("profile.budget is %d bytes: give at most 1G", p.Budget)
	}
	return nil
}
