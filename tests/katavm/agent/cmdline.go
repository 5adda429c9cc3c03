package main

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

// cmdline is the kernel's command line by key; a bare word has the value "".
type cmdline map[string]string

func readCmdline(file string) (cmdline, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	c := cmdline{}
	for _, word := range strings.Fields(string(b)) {
		key, value, _ := strings.Cut(word, "=")
		c[key] = value
	}
	return c, nil
}

var extensionKey = regexp.MustCompile(`^kata\.extension\.([a-zA-Z0-9_-]+)\.verity_params$`)

// extensions are the names that the runtime has put on the command line
// (src/agent/kata-extension-mount-generator.sh).
func (c cmdline) extensions() []string {
	var names []string
	for _, key := range slices.Sorted(maps.Keys(c)) {
		if m := extensionKey.FindStringSubmatch(key); m != nil {
			names = append(names, m[1])
		}
	}
	return names
}
