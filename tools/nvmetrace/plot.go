package main

import (
	"cmp"
	"fmt"
	"image/color"
	"io"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

const (
	maxColumns = 600 // of a heatMap
	maxPanels  = 6   // groups that are drawn: those of most commands
	plotParts  = 8   // cells of a power of two
	seam       = vg.Length(0.4)
)

// heatMap is latencies over time, for a picture.
type heatMap struct {
	columns []heatColumn
	merge   int // how many steps are put in one column
	pending int // steps in the last column
	total   map[string]*latency.Histogram
	order   []string // of total
}

type heatColumn struct {
	from, to float64 // s
	lat      map[string]*latency.Histogram
}

func newHeatMap() *heatMap { return &heatMap{merge: 1, total: map[string]*latency.Histogram{}} }

// add takes what came between two times in seconds.
func (m *heatMap) add(from, to float64, groups []*group) {
	if m.pending == 0 || m.pending == m.merge {
		if len(m.columns) == maxColumns {
			m.halve()
		}
		m.columns = append(m.columns, heatColumn{from: from, lat: map[string]*latency.Histogram{}})
		m.pending = 0
	}
	m.pending++
	c := &m.columns[len(m.columns)-1]
	c.to = to
	for _, g := range groups {
		into(c.lat, g.Name, &g.lat)
		if m.total[g.Name] == nil {
			m.order = append(m.order, g.Name)
		}
		into(m.total, g.Name, &g.lat)
	}
}

func into(m map[string]*latency.Histogram, name string, h *latency.Histogram) {
	if m[name] == nil {
		m[name] = new(latency.Histogram)
	}
	m[name].Merge(h)
}

// halve puts each two columns into one.
func (m *heatMap) halve() {
	for i := 0; i < len(m.columns)/2; i++ {
		c, next := m.columns[2*i], m.columns[2*i+1]
		c.to = next.to
		for name, h := range next.lat {
			into(c.lat, name, h)
		}
		m.columns[i] = c
	}
	clear(m.columns[len(m.columns)/2:])
	m.columns = m.columns[:len(m.columns)/2]
	m.merge *= 2
}

// panels are the groups that are drawn, those of most commands first.
func (m *heatMap) panels() []string {
	names := slices.Clone(m.order)
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(m.total[b].Count(), m.total[a].Count()) })
	names = slices.DeleteFunc(names, func(n string) bool { return m.total[n].Count() == 0 })
	return names[:min(len(names), maxPanels)]
}

// draw draws a panel for each group, above each other, in the format that name ends with.
func (m *heatMap) draw(w io.Writer, name string, seconds float64) error {
	const width, height, bar = 10 * vg.Inch, 3.4 * vg.Inch, 1.05 * vg.Inch
	names := m.panels()
	c, err := draw.NewFormattedCanvas(width, height*vg.Length(max(len(names), 1)), strings.ToLower(strings.TrimPrefix(filepath.Ext(name), ".")))
	if err != nil {
		return fmt.Errorf("%s: %w (use a name that ends in .svg or .png)", name, err)
	}
	dc := draw.New(c)
	dc.SetColor(color.White)
	dc.Fill(dc.Rectangle.Path())
	if len(names) == 0 {
		p := newPlot(fmt.Sprintf("no command ended in %.0f s", seconds))
		p.HideAxes()
		p.Draw(dc)
	}
	for i, name := range names {
		tile := dc
		tile.Max.Y = dc.Max.Y - vg.Length(i)*height - vg.Points(6)
		tile.Min.Y = dc.Max.Y - vg.Length(i+1)*height + vg.Points(6)
		left, right := tile, tile
		left.Min.X, left.Max.X = tile.Min.X+vg.Points(8), tile.Max.X-bar
		right.Min.X, right.Max.X = tile.Max.X-bar+vg.Points(10), tile.Max.X-vg.Points(6)
		m.panel(name, left, right, seconds)
	}
	_, err = c.WriteTo(w)
	return err
}

func newPlot(title string) *plot.Plot {
	plot.DefaultFont.Variant = "Sans"
	p := plot.New()
	p.Title.Text = title
	p.Title.Padding = vg.Points(5)
	p.Title.TextStyle.Font.Size = font.Points(11)
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.Label.TextStyle.Font.Size, a.Tick.Label.Font.Size = font.Points(11), font.Points(10)
		a.Padding = 0
	}
	p.Legend.TextStyle.Font.Size = font.Points(10)
	p.Legend.Padding = vg.Points(2)
	return p
}

// panel draws one group, and the bar of its colours beside it.
func (m *heatMap) panel(name string, left, right draw.Canvas, seconds float64) {
	h := m.total[name]
	rate := ""
	if seconds > 0 {
		rate = fmt.Sprintf(" (%s per second)", text.Count(float64(h.Count())/seconds))
	}
	// Without runs of spaces, which SVG does not keep.
	p := newPlot(fmt.Sprintf("%s: %s commands%s, p50 %s, p99 %s, max %s", name, text.Count(float64(h.Count())), rate,
		ns(int64(h.Quantile(0.5))), ns(int64(h.Quantile(0.99))), ns(int64(h.Max()))))
	p.X.Label.Text, p.Y.Label.Text = "time in seconds", "latency"
	cells, most := m.cells(name)
	p.Add(cells)
	p.X.Min, p.X.Max = m.columns[0].from, m.columns[len(m.columns)-1].to
	p.X.Tick.Marker = secondTicks{}
	p.Y.Min, p.Y.Max = around10(cells)
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, latencyTicks{}
	for _, q := range []struct {
		name  string
		of    float64
		color color.Color
	}{{"p50", 0.5, color.RGBA{0xf5, 0x9e, 0x0b, 0xff}}, {"p99", 0.99, color.RGBA{0xdc, 0x26, 0x26, 0xff}}} {
		style := draw.LineStyle{Color: q.color, Width: vg.Points(1.4)}
		for _, line := range m.quantiles(name, q.of) {
			p.Add(&plotter.Line{XYs: line, LineStyle: style})
		}
		p.Legend.Add(q.name, &plotter.Line{LineStyle: style})
	}
	p.Legend.Top, p.Legend.XOffs, p.Legend.YOffs = true, -vg.Points(6), -vg.Points(4)
	p.Draw(left)

	bar := newPlot("commands")
	bar.Title.TextStyle.Font.Size = font.Points(10)
	bar.Add(colourBar(most))
	bar.HideX()
	bar.X.Min, bar.X.Max = 0, 1
	bar.Y.Min, bar.Y.Max = 1, float64(max(most, 2))
	bar.Y.Scale, bar.Y.Tick.Marker = plot.LogScale{}, countTicks{}
	// As high as the map, which has an axis and its label below it.
	right.Min.Y += vg.Points(31)
	bar.Draw(right)
}

// cell is a rectangle of one colour.
type cell struct {
	x0, x1, y0, y1 float64
	color          color.Color
}

// cells is a plot.Plotter of rectangles.
type cells []cell

// Plot is part of plot.Plotter.
func (cs cells) Plot(c draw.Canvas, p *plot.Plot) {
	trX, trY := p.Transforms(&c)
	for _, r := range cs {
		// A little of the next one, so that no seam shows between them.
		x0, x1, y0, y1 := trX(r.x0), min(trX(r.x1)+seam, c.Max.X), trY(r.y0), min(trY(r.y1)+seam, c.Max.Y)
		c.FillPolygon(r.color, []vg.Point{{X: x0, Y: y0}, {X: x1, Y: y0}, {X: x1, Y: y1}, {X: x0, Y: y1}})
	}
}

// cells are the rectangles of one group, and how many commands the fullest has.
func (m *heatMap) cells(name string) (out cells, most uint64) {
	type at struct {
		column int
		latency.Bucket
	}
	var all []at
	for i, c := range m.columns {
		if c.lat[name] == nil {
			continue
		}
		for _, b := range barsOf(c.lat[name], plotParts) {
			if b.Count > 0 {
				all = append(all, at{i, b})
				most = max(most, b.Count)
			}
		}
	}
	for _, a := range all {
		c := m.columns[a.column]
		out = append(out, cell{c.from, c.to, float64(a.Low), float64(a.High), shadeOf(a.Count, most)})
	}
	return out, most
}

// quantiles are stairs over the columns: each from the first column that has commands to the last before one that has none.
func (m *heatMap) quantiles(name string, q float64) (out []plotter.XYs) {
	var line plotter.XYs
	for _, c := range m.columns {
		h := c.lat[name]
		if h == nil || h.Count() == 0 {
			out, line = append(out, line), nil
			continue
		}
		y := max(float64(h.Quantile(q)), 16)
		line = append(line, plotter.XY{X: c.from, Y: y}, plotter.XY{X: c.to, Y: y})
	}
	return slices.DeleteFunc(append(out, line), func(l plotter.XYs) bool { return l == nil })
}

// around10 is the range of latencies that is drawn: from the fastest to the slowest, with some room.
func around10(cs cells) (low, high float64) {
	low, high = math.Inf(1), 0
	for _, c := range cs {
		low, high = min(low, c.y0), max(high, c.y1)
	}
	return low / 1.3, high * 1.6 // the legend is at the top
}

// ramp is the colours of few to many, light to dark.
var ramp = []color.RGBA{{0xe0, 0xec, 0xf8, 0xff}, {0x9e, 0xca, 0xe1, 0xff}, {0x4f, 0xa3, 0xc7, 0xff}, {0x21, 0x6f, 0xa8, 0xff}, {0x2a, 0x3f, 0x8f, 0xff}, {0x2b, 0x12, 0x5c, 0xff}}

// shadeOf is n's colour where most is the darkest, by the logarithm.
func shadeOf(n, most uint64) color.Color {
	at := 1.0
	if most > 1 {
		at = math.Log(float64(n)) / math.Log(float64(most))
	}
	at *= float64(len(ramp) - 1)
	i := min(int(at), len(ramp)-2)
	part := at - float64(i)
	mix := func(a, b uint8) uint8 { return uint8(math.Round(float64(a) + part*(float64(b)-float64(a)))) }
	a, b := ramp[i], ramp[i+1]
	return color.RGBA{mix(a.R, b.R), mix(a.G, b.G), mix(a.B, b.B), 0xff}
}

// colourBar is all colours from 1 to most.
func colourBar(most uint64) (out cells) {
	const steps = 64
	top := float64(max(most, 2))
	for i := range steps {
		low, high := math.Pow(top, float64(i)/steps), math.Pow(top, float64(i+1)/steps)
		out = append(out, cell{0, 1, low, high, shadeOf(max(uint64(math.Round(math.Sqrt(low*high))), 1), max(most, 2))})
	}
	return out
}

// secondTicks are 5 to 12 round numbers.
type secondTicks struct{}

// Ticks is part of plot.Ticker.
func (secondTicks) Ticks(low, high float64) (out []plot.Tick) {
	span := max(high-low, 1e-3)
	step := math.Pow(10, math.Floor(math.Log10(span))-1)
	for _, by := range []float64{2, 2.5, 2} { // to 2, 5, 10
		if span/step <= 12 {
			break
		}
		step *= by
	}
	for i := math.Ceil(low/step - 0.01); i*step <= high*(1+1e-9); i++ {
		v := math.Round(i*step*1000) / 1000
		if v == 0 {
			v = 0 // and not -0
		}
		out = append(out, plot.Tick{Value: max(i*step, low), Label: strconv.FormatFloat(v, 'f', -1, 64)})
	}
	return out
}

// latencyTicks are at 1, 2 and 5 of each power of ten if there are few powers, else at powers.
type latencyTicks struct{}

// Ticks is part of plot.Ticker.
func (latencyTicks) Ticks(low, high float64) []plot.Tick {
	return logTicks(low, high, func(v float64) string {
		return strings.NewReplacer("ns", " ns", "µs", " us", "ms", " ms").Replace(time.Duration(v).String())
	})
}

// countTicks is latencyTicks for numbers.
type countTicks struct{}

// Ticks is part of plot.Ticker.
func (countTicks) Ticks(low, high float64) []plot.Tick {
	return logTicks(low, high, func(v float64) string { return text.Count(v) })
}

func logTicks(low, high float64, label func(float64) string) (out []plot.Tick) {
	few := high/low < 1000
	for power := math.Pow(10, math.Floor(math.Log10(low))); power <= high; power *= 10 {
		for i := 1; i <= 9; i++ {
			v := math.Round(power * float64(i))
			if v < low || v > high {
				continue
			}
			t := plot.Tick{Value: v}
			if i == 1 || few && (i == 2 || i == 5) {
				t.Label = label(v)
			}
			out = append(out, t)
		}
	}
	return out
}
