#!/bin/sh
# Runs every fuzz target of the module for the given time each (default 10s).
# Minimizing is kept short: it would take all of that time where goroutines or
# pools make coverage vary from run to run.
set -eu
time=${1:-10s}
for dir in $(go list -f '{{.Dir}}' ./...); do
	for target in $(grep -ohE '^func Fuzz[A-Za-z0-9_]+' "$dir"/*_test.go 2>/dev/null | sed 's/^func //'); do
		echo "fuzz ${dir#"$PWD"/} $target"
		(cd "$dir" && go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1s .)
	done
done
