#!/bin/sh
# Runs every fuzz target of the module for the given time each (default 10s).
# Minimizing is kept short: it would take all of that time where goroutines or
# pools make coverage vary from run to run. A run that says nothing but that its time
# is over was cut off by go test itself, and begins once more.
set -eu
time=${1:-10s}
out=$(mktemp)
trap 'rm -f "$out"' EXIT

fuzz() {
	(cd "$1" && go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" -fuzzminimizetime 1s .) >"$out" 2>&1
}

cutoff() {
	grep -q '^ *context deadline exceeded$' "$out" && ! grep -q 'Failing input' "$out"
}

for dir in $(go list -f '{{.Dir}}' ./...); do
	for target in $(grep -ohE '^func Fuzz[A-Za-z0-9_]+' "$dir"/*_test.go 2>/dev/null | sed 's/^func //'); do
		echo "fuzz ${dir#"$PWD"/} $target"
		fuzz "$dir" "$target" || { cutoff && fuzz "$dir" "$target"; } || { cat "$out"; exit 1; }
		tail -n 1 "$out"
	done
done
