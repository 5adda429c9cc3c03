package registrytest

import (
	"fmt"
	"net/http"
	"slices"
)

// Once says which bytes of a blob of some size were asked for twice in requests of it.
func Once(requests []Request, size int64) error {
	type part struct {
		first, last int64
		path        string
	}
	var parts []part
	for _, r := range requests {
		if r.Method != http.MethodGet {
			continue
		}
		p := part{0, size - 1, r.Path}
		if r.Range != "" {
			if _, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &p.first, &p.last); err != nil {
				return fmt.Errorf("range %q of %s: %w", r.Range, r.Path, err)
			}
		}
		parts = append(parts, p)
	}
	slices.SortFunc(parts, func(a, b part) int { return int(a.first - b.first) })
	for i := 1; i < len(parts); i++ {
		if parts[i].first <= parts[i-1].last {
			return fmt.Errorf("%s was asked for %d-%d and for %d-%d", parts[i].path,
				parts[i-1].first, parts[i-1].last, parts[i].first, parts[i].last)
		}
	}
	return nil
}
