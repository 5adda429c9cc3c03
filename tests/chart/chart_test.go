package chart

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"testing"
)

// What is drawn is XML, whatever the names are, also of a chart without points.
func TestWellFormed(t *testing.T) {
	line := Line{Name: "<a & b>", Points: [][2]float64{{1, 10}, {5, 0.2}}}
	for _, c := range []Chart{
		{Title: "x < y"},
		{Title: "logarithmic", Lines: []Line{line}},
		{Title: "linear", LinearX: true, LinearY: true, Lines: []Line{line, {Name: "dots", Dots: true, Points: [][2]float64{{0, 0}}}}},
	} {
		var b bytes.Buffer
		if err := c.WriteSVG(&b); err != nil {
			t.Fatal(err)
		}
		for d := xml.NewDecoder(&b); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", c.Title, err)
			}
		}
	}
}

func TestTicks(t *testing.T) {
	for _, c := range []struct {
		axis axis
		want []float64
	}{
		{axis{linear: true, high: 10}, []float64{0, 2, 4, 6, 8, 10}},
		{axis{linear: true, high: 27}, []float64{0, 5, 10, 15, 20, 25}},
		{axis{low: 1, high: 20}, []float64{1, 2, 5, 10, 20}},
		{axis{low: 1, high: 10_000}, []float64{1, 10, 100, 1000, 10_000}},
	} {
		if got := c.axis.ticks(); !slices.Equal(got, c.want) {
			t.Errorf("ticks of %+v: %v, want %v", c.axis, got, c.want)
		}
	}
}
