// Package sched tests the scheduler over the kernel's TCP: many connections of a class
// that may wait and one of a class that may not, through a link that is the bottleneck.
package sched
