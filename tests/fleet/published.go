package fleet

import "github.com/tatami-containers/tatami/tests/chart"

// published are the runs of Volcano Engine: seconds until the last of so many pods was
// there, rounded to 5 s.
var (
	publishedPods = [4]int{50, 100, 200, 500}
	published     = []struct {
		image string
		size  float64
		way   string
		took  [4]float64
	}{
		{"Nginx", volcanoNginx, oci, [4]float64{35, 65, 135, 1020}},
		{"Nginx", volcanoNginx, dragonfly, [4]float64{10, 10, 15, 25}},
		{"Nginx", volcanoNginx, dragonflyNydus, [4]float64{5, 10, 15, 15}},
		{"TensorFlow", volcanoTensorFlow, oci, [4]float64{260, 1380, 4245, 10800}},
		{"TensorFlow", volcanoTensorFlow, dragonfly, [4]float64{40, 40, 50, 55}},
		{"TensorFlow", volcanoTensorFlow, dragonflyNydus, [4]float64{10, 10, 15, 15}},
	}
)

// Published draws the model over the published runs of an image of 3 GB.
func Published() chart.Chart {
	c := chart.Chart{Title: "TensorFlow, 3 GB: the model (lines) and what Volcano Engine published (circles)", X: "pods", Y: "seconds until the last one runs"}
	for i, p := range published[3:] {
		model := chart.Line{Name: p.way, Colour: i}
		for n := 50; n <= 500; n += 25 {
			model.Points = append(model.Points, [2]float64{float64(n), volcano(p.way, n, p.size).All()})
		}
		dots := chart.Line{Name: p.way + ", published", Colour: i, Dots: true}
		for j, n := range publishedPods {
			dots.Points = append(dots.Points, [2]float64{float64(n), p.took[j]})
		}
		c.Lines = append(c.Lines, model, dots)
	}
	return c
}

// Times and Bytes draw the ways over the size of the fleet.
func Times() chart.Chart {
	return overSize("An image of 1 GB, a registry of 10 Gbit/s", "seconds until the last node is ready", Result.All)
}

// Bytes draws what the registry sends.
func Bytes() chart.Chart {
	return overSize("An image of 1 GB: what the registry sends", "GB", func(r Result) float64 { return r.Sent / 1e9 })
}

func overSize(title, y string, value func(Result) float64) chart.Chart {
	c := chart.Chart{Title: title, X: "nodes", Y: y}
	for i, w := range Ways() {
		l := chart.Line{Name: w.Name, Colour: i}
		for n := Sizes[0]; n <= Sizes[len(Sizes)-1]; n += 1000 {
			l.Points = append(l.Points, [2]float64{float64(n), value(w.Run(n))})
		}
		c.Lines = append(c.Lines, l)
	}
	return c
}
