package main

import (
	"fmt"
	"image/color"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/shadowbell/shadowbell/ebpf/path"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// drawPath draws a bar for each group, as long as the mean of its commands and made of its spans, in the format that name ends with.
func drawPath(w io.Writer, name string, x pathJSON) error {
	var groups []*pathGroup
	for i := range x.Groups {
		if g := &x.Groups[i]; g.Commands > 0 && g.Kind != "hostmed" {
			groups = append(groups, g)
		}
	}
	const width, bar, rest = 9 * vg.Inch, 0.75 * vg.Inch, 1.15 * vg.Inch
	height := rest + bar*vg.Length(max(len(groups), 1))
	c, err := draw.NewFormattedCanvas(width, height, strings.ToLower(strings.TrimPrefix(filepath.Ext(name), ".")))
	if err != nil {
		return fmt.Errorf("%s: %w (use a name that ends in .svg or .png)", name, err)
	}
	dc := draw.New(c)
	dc.SetColor(color.White)
	dc.Fill(dc.Rectangle.Path())
	p := newPlot("where the time of a command goes, on average")
	if len(groups) == 0 {
		p.Title.Text = "no command ended"
		p.HideAxes()
	} else {
		bars := pathBars{groups: groups}
		p.Add(bars)
		p.HideY()
		p.Y.Min, p.Y.Max = 0, float64(len(groups))
		p.X.Min, p.X.Max = 0, bars.longest()*1.02
		p.X.Label.Text, p.X.Tick.Marker = "us", secondTicks{}
		for s := range path.Spans {
			if bars.has(s) {
				p.Legend.Add(s.String(), swatch{pathColour(s)})
			}
		}
	}
	legend := p.Legend
	p.Legend = plot.NewLegend()
	area := dc
	area.Min.X, area.Max.X = area.Min.X+vg.Points(10), area.Max.X-vg.Points(130)
	area.Min.Y, area.Max.Y = area.Min.Y+vg.Points(6), area.Max.Y-vg.Points(6)
	p.Draw(area)
	right := dc
	right.Min.X, right.Max.Y = area.Max.X+vg.Points(8), area.Max.Y-vg.Points(22)
	legend.Top, legend.Left = true, true
	legend.Padding, legend.ThumbnailWidth = vg.Points(3), vg.Points(12)
	legend.Draw(right)
	_, err = c.WriteTo(w)
	return err
}

func pathColour(s path.Span) color.Color {
	n, _ := strconv.ParseUint(pathColours[s][1:], 16, 32)
	return color.RGBA{uint8(n >> 16), uint8(n >> 8), uint8(n), 0xff}
}

// swatch is a plot.Thumbnailer.
type swatch struct{ color.Color }

// Thumbnail is part of plot.Thumbnailer.
func (s swatch) Thumbnail(c *draw.Canvas) {
	c.FillPolygon(s.Color, []vg.Point{{X: c.Min.X, Y: c.Min.Y}, {X: c.Min.X, Y: c.Max.Y}, {X: c.Max.X, Y: c.Max.Y}, {X: c.Max.X, Y: c.Min.Y}})
}

// pathBars is a plot.Plotter: one group below the other, from the top.
type pathBars struct{ groups []*pathGroup }

// longest is in us.
func (b pathBars) longest() (us float64) {
	for _, g := range b.groups {
		us = max(us, float64(g.Mean)/1e3)
	}
	return max(us, 1e-3)
}

func (b pathBars) has(s path.Span) bool {
	for _, g := range b.groups {
		for _, x := range g.Spans {
			if x.span == s {
				return true
			}
		}
	}
	return false
}

// Plot is part of plot.Plotter.
func (b pathBars) Plot(c draw.Canvas, p *plot.Plot) {
	trX, trY := p.Transforms(&c)
	style := p.X.Tick.Label
	style.Font.Size = font.Points(9)
	for i, g := range b.groups {
		top := float64(len(b.groups) - i)
		low, high := trY(top-0.86), trY(top-0.4)
		at := 0.0
		for _, s := range g.Spans {
			end := at + s.Share*float64(g.Mean)/1e3
			x0, x1 := trX(at), trX(end)
			c.FillPolygon(pathColour(s.span), []vg.Point{{X: x0, Y: low}, {X: x0, Y: high}, {X: x1, Y: high}, {X: x1, Y: low}})
			label := style
			label.XAlign, label.YAlign = draw.XCenter, draw.YCenter
			if s.span == path.Device || s.span == path.Hostmed {
				label.Color = color.White
			}
			if words := shortest(s.Mean); label.Width(words)+vg.Points(4) < x1-x0 {
				c.FillText(label, vg.Point{X: (x0 + x1) / 2, Y: (low + high) / 2}, words)
			}
			at = end
		}
		name := style
		name.XAlign, name.YAlign, name.Font.Size = draw.XLeft, draw.YBottom, font.Points(10)
		c.FillText(name, vg.Point{X: trX(0), Y: high + vg.Points(3)}, fmt.Sprintf("%s: %s commands, mean %s, p99 %s", g.Name, text.Count(float64(g.Commands)), ns(g.Mean), ns(g.P99)))
	}
}

// shortest is a time for a place that is small.
func shortest(v int64) string {
	if v < int64(time.Millisecond) {
		return strings.TrimSuffix(text.Duration(time.Duration(v)), " us")
	}
	return ns(v)
}
