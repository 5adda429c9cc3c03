// Package chart draws curves as SVG, with the standard library only.
package chart

import (
	"errors"
	"fmt"
	"html"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
)

// Chart is a drawing of curves in a plane. Its axes are logarithmic where they are not
// said to be linear.
type Chart struct {
	Title, X, Y      string
	LinearX, LinearY bool
	Lines            []Line
}

// Line is one curve. Its points are positive where an axis is logarithmic.
type Line struct {
	Name   string
	Points [][2]float64 // x and y
	Dots   bool         // not joined: what was measured or published
	Colour int          // of the palette
}

// palette tells colour-blind readers the lines apart (Okabe and Ito, 2008).
var palette = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"}

// Of the drawing, in pixels; the legend is right of the plane.
const (
	planeLeft, planeTop     = 70, 40
	planeWidth, planeHeight = 420, 320
	legendAt                = planeLeft + planeWidth + 20
	chartWidth, chartHeight = legendAt + 250, planeTop + planeHeight + 60
)

// axis maps values to pixels, from low to high.
type axis struct {
	linear     bool
	low, high  float64
	zero, size float64 // pixels; size is negative where they go up
}

func (a axis) at(v float64) float64 {
	if a.linear {
		return a.zero + a.size*(v-a.low)/(a.high-a.low)
	}
	return a.zero + a.size*math.Log(v/a.low)/math.Log(a.high/a.low)
}

// ticks are at round values.
func (a axis) ticks() []float64 {
	if a.linear {
		return a.even()
	}
	return a.powers()
}

// even are multiples of 1, 2 or 5 times a power of ten, five to ten of them.
func (a axis) even() (all []float64) {
	step := math.Pow(10, math.Floor(math.Log10((a.high-a.low)/5)))
	for _, n := range []float64{5, 2} {
		if (a.high-a.low)/(n*step) >= 5 {
			step *= n
			break
		}
	}
	for i := math.Ceil(a.low / step); i*step <= a.high; i++ {
		all = append(all, i*step)
	}
	return all
}

// powers are 1, 2 and 5 times powers of ten; without 2 and 5 where there would be too many.
func (a axis) powers() (all []float64) {
	steps := []float64{1, 2, 5}
	if a.high/a.low > 300 {
		steps = steps[:1]
	}
	for p := math.Pow(10, math.Floor(math.Log10(a.low))); p <= a.high; p *= 10 {
		for _, s := range steps {
			if v := p * s; v >= a.low*0.999 && v <= a.high*1.001 {
				all = append(all, v)
			}
		}
	}
	return all
}

// axes that all points are within.
func (c Chart) axes() (x, y axis) {
	x = axis{linear: c.LinearX, low: math.Inf(1), high: math.Inf(-1), zero: planeLeft, size: planeWidth}
	y = axis{linear: c.LinearY, low: math.Inf(1), high: math.Inf(-1), zero: planeTop + planeHeight, size: -planeHeight}
	for _, l := range c.Lines {
		for _, p := range l.Points {
			x.low, x.high = min(x.low, p[0]), max(x.high, p[0])
			y.low, y.high = min(y.low, p[1]), max(y.high, p[1])
		}
	}
	x.widen()
	y.widen()
	return x, y
}

// widen makes some room around the points; a linear axis begins at zero.
func (a *axis) widen() {
	if a.linear {
		a.low, a.high = min(a.low, 0), max(a.high*1.05, 1e-9)
		return
	}
	a.low, a.high = a.low/1.2, a.high*1.2
}

// WriteSVG draws it.
func (c Chart) WriteSVG(w io.Writer) error {
	b := &svg{}
	fmt.Fprintf(b, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\">\n", chartWidth, chartHeight)
	fmt.Fprintf(b, "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", chartWidth, chartHeight)
	b.text(planeLeft, 22, "start", " font-size=\"14\"", c.Title)
	x, y := c.axes()
	b.plane(x, y, c.X, c.Y)
	for i, l := range c.Lines {
		b.line(l, x, y)
		at := float64(planeTop + 12 + 20*i)
		b.sample(l, at-4)
		b.text(legendAt+32, at, "start", "", l.Name)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteFile draws it in a file.
func (c Chart) WriteFile(file string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return c.WriteSVG(f)
}

// svg is a drawing.
type svg struct{ strings.Builder }

func (b *svg) text(x, y float64, anchor, more, s string) {
	fmt.Fprintf(b, "<text x=\"%.0f\" y=\"%.0f\" text-anchor=\"%s\"%s>%s</text>\n", x, y, anchor, more, html.EscapeString(s))
}

// plane draws the axes with their names, and a grid.
func (b *svg) plane(x, y axis, nameX, nameY string) {
	for _, v := range x.ticks() {
		fmt.Fprintf(b, "<path d=\"M%.1f %dv%d\" stroke=\"#ddd\"/>\n", x.at(v), planeTop, planeHeight)
		b.text(x.at(v), planeTop+planeHeight+18, "middle", "", label(v))
	}
	for _, v := range y.ticks() {
		fmt.Fprintf(b, "<path d=\"M%d %.1fh%d\" stroke=\"#ddd\"/>\n", planeLeft, y.at(v), planeWidth)
		b.text(planeLeft-6, y.at(v)+4, "end", "", label(v))
	}
	fmt.Fprintf(b, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"none\" stroke=\"#444\"/>\n", planeLeft, planeTop, planeWidth, planeHeight)
	b.text(planeLeft+planeWidth/2, planeTop+planeHeight+40, "middle", "", nameX)
	middle := float64(planeTop + planeHeight/2)
	b.text(18, middle, "middle", fmt.Sprintf(" transform=\"rotate(-90 18 %.0f)\"", middle), nameY)
}

// line draws a curve.
func (b *svg) line(l Line, x, y axis) {
	var at [][2]float64
	for _, p := range l.Points {
		at = append(at, [2]float64{x.at(p[0]), y.at(p[1])})
	}
	b.draw(l, at)
}

// sample draws a piece of a curve for the legend.
func (b *svg) sample(l Line, y float64) {
	if l.Dots {
		b.draw(l, [][2]float64{{legendAt + 12, y}})
		return
	}
	b.draw(l, [][2]float64{{legendAt, y}, {legendAt + 24, y}})
}

// draw draws a curve through pixels.
func (b *svg) draw(l Line, at [][2]float64) {
	colour := palette[l.Colour%len(palette)]
	if l.Dots {
		for _, p := range at {
			fmt.Fprintf(b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", p[0], p[1], colour)
		}
		return
	}
	fmt.Fprint(b, "<path d=\"")
	for i, p := range at {
		fmt.Fprintf(b, "%c%.1f %.1f", "ML"[min(i, 1)], p[0], p[1])
	}
	fmt.Fprintf(b, "\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", colour)
}

// label writes 10000 as it is and 0.5 as well.
func label(v float64) string { return strconv.FormatFloat(v, 'f', -1, 32) }
