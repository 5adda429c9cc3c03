// Package class says of which class of workload a container is, and why: from what
// the node knows of its pod, never from what its sandbox says. What says something
// first counts:
//
//  1. a label or an annotation of the pod that the settings name
//  2. Koordinator's labels of the pod
//  3. the runtime handler, snapshotter or namespace that the settings name
//  4. the QoS class of Kubernetes that the settings name
//  5. that QoS class: BestEffort is batch, the others are online
//  6. the default class
//
// So what a pod says of itself comes before what is said of all pods of its kind. Of
// two rules at the same place, that of the more important class counts.
package class

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Classes that every node has.
const (
	Online = "online"
	Batch  = "batch"
)

// Class is a class with the rules of the settings for it.
type Class struct {
	Name  string
	Match []string // as ParseRule reads them
}

// Choice is a class and why it is that one.
type Choice struct{ Class, Reason string }

// Words of rules that are no keys of labels.
const (
	wordQoS         = "qos"
	wordRuntime     = "runtime"
	wordSnapshotter = "snapshotter"
	wordNamespace   = "namespace"
)

// Rule holds for what has this value, or, if that ends in "*", one that begins so.
type Rule struct{ key, value string }

// maxRule bounds a rule in bytes. Keys of labels have at most 317, values 63
// (Kubernetes, "Labels and Selectors").
const maxRule = 512

// ParseRule reads KEY=VALUE: KEY is the key of a label or an annotation, or qos,
// runtime, snapshotter or namespace.
func ParseRule(text string) (Rule, error) {
	key, value, ok := strings.Cut(text, "=")
	if !ok || key == "" || len(text) > maxRule || strings.ContainsAny(text, " \t\n") {
		return Rule{}, fmt.Errorf("%.64q: give KEY=VALUE, where KEY is that of a label or an annotation, or one of qos, runtime, snapshotter, namespace: %w", text, errdefs.ErrInvalidArgument)
	}
	if all := []string{Guaranteed, Burstable, BestEffort}; key == wordQoS && !slices.Contains(all, value) {
		return Rule{}, fmt.Errorf("%q: give one of %s: %w", text, strings.Join(all, ", "), errdefs.ErrInvalidArgument)
	}
	return Rule{key, value}, nil
}

// holds says whether the rule holds for f, and what of f it was.
func (r Rule) holds(f Facts) (why string, ok bool) {
	switch r.key {
	case wordQoS:
		return r.fits("Kubernetes QoS ", f.QoS)
	case wordRuntime:
		return r.fits("runtime handler ", f.Runtime)
	case wordSnapshotter:
		return r.fits("snapshotter ", f.Snapshotter)
	case wordNamespace:
		return r.fits("namespace ", f.Namespace)
	}
	if value, has := f.Labels[r.key]; has && r.fit(value) {
		return "label " + r.key + "=" + short(value), true
	}
	if value, has := f.Annotations[r.key]; has && r.fit(value) {
		return "annotation " + r.key + "=" + short(value), true
	}
	return "", false
}

func (r Rule) fits(what, value string) (why string, ok bool) {
	return what + short(value), value != "" && r.fit(value)
}

func (r Rule) fit(value string) bool {
	if begin, ok := strings.CutSuffix(r.value, "*"); ok {
		return strings.HasPrefix(value, begin)
	}
	return value == r.value
}

// short is the beginning of a value, which in an annotation may be anything.
func short(value string) string { return fmt.Sprintf("%.64s", value) }

// step is the place of a rule among all of them.
func (r Rule) step() int {
	switch r.key {
	case wordQoS:
		return 4
	case wordRuntime, wordSnapshotter, wordNamespace:
		return 3
	}
	return 1
}

// Koordinator's labels, and what their values mean here. Priorities mid, batch and
// free run on what prod leaves over.
// (koordinator apis/extension/constants.go, qos.go, priority.go.)
var koordinator = []struct {
	key   string
	means map[string][]string // class to values
}{
	{"koordinator.sh/qosClass", map[string][]string{Online: {"LSE", "LSR", "LS", "SYSTEM"}, Batch: {"BE"}}},
	{"koordinator.sh/priority-class", map[string][]string{Online: {"koord-prod"}, Batch: {"koord-mid", "koord-batch", "koord-free"}}},
}

// kubernetes is what its QoS classes mean, as to Koordinator, where Guaranteed and
// Burstable are latency-sensitive (apis/extension/qos_utils.go).
var kubernetes = map[string][]string{Online: {Guaranteed, Burstable}, Batch: {BestEffort}}

// Rules choose classes. They are immutable.
type Rules struct {
	names   []string // by importance
	byDef   string
	ordered []placed
}

// placed is a rule with the class that it gives.
type placed struct {
	Rule
	class string
}

// New returns the rules of these classes, the most important first, of which def is
// the default.
func New(classes []Class, def string) (*Rules, error) {
	r := &Rules{byDef: def}
	at := map[int][]placed{}
	for _, c := range classes {
		r.names = append(r.names, c.Name)
		for _, text := range c.Match {
			rule, err := ParseRule(text)
			if err != nil {
				return nil, fmt.Errorf("match of class %s: %w", c.Name, err)
			}
			at[rule.step()] = append(at[rule.step()], placed{rule, c.Name})
		}
	}
	for _, k := range koordinator {
		at[2] = append(at[2], builtIn(k.key, k.means)...)
	}
	at[5] = builtIn(wordQoS, kubernetes)
	for step := 1; step <= 5; step++ {
		r.ordered = append(r.ordered, at[step]...)
	}
	return r, r.Check(def)
}

func builtIn(key string, means map[string][]string) (out []placed) {
	for class, values := range means {
		for _, v := range values {
			out = append(out, placed{Rule{key, v}, class})
		}
	}
	return out
}

// Check says whether there is a class of this name.
func (r *Rules) Check(name string) error {
	if !slices.Contains(r.names, name) {
		return fmt.Errorf("class %.64q: give one of %s: %w", name, strings.Join(r.names, ", "), errdefs.ErrInvalidArgument)
	}
	return nil
}

// Default is the class of what says nothing.
func (r *Rules) Default() string { return r.byDef }

// Choose says of which class it is.
func (r *Rules) Choose(f Facts) Choice {
	c := Choice{r.byDef, "default class"}
	for _, rule := range r.ordered {
		if why, ok := rule.holds(f); ok {
			c = Choice{rule.class, why}
			break
		}
	}
	if f.Incomplete {
		c.Reason += " (labels and runtime handler of the pod are not known)"
	}
	return c
}

// Before says whether the class of a is the more important one. Both are choices of r.
func (r *Rules) Before(a, b Choice) bool {
	return slices.Index(r.names, a.Class) < slices.Index(r.names, b.Class)
}
