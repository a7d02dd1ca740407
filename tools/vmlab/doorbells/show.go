package doorbells

import (
	"fmt"
	"image/color"
	"io"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// series are the devices in the order in which they are shown.
var series = []struct {
	name   string
	figure func(Row) Figure
	color  color.Color
	shape  draw.GlyphDrawer
}{
	{"trap", func(r Row) Figure { return r.Trap }, color.RGBA{0xb4, 0x53, 0x09, 0xff}, draw.BoxGlyph{}},
	{"QEMU's own", func(r Row) Figure { return r.QEMU }, color.RGBA{0x6b, 0x72, 0x80, 0xff}, draw.TriangleGlyph{}},
	{"shadow", func(r Row) Figure { return r.Shadow }, color.RGBA{0x1d, 0x4e, 0xd8, 0xff}, draw.CircleGlyph{}},
}

// Table prints the rows.
func Table(rows []Row) string {
	t := text.Table{Head: []string{"queue depth"}}
	for _, s := range series {
		t.Head = append(t.Head, s.name+": MMIO per I/O", "IOPS")
	}
	for _, r := range rows {
		cells := []string{fmt.Sprint(r.Depth)}
		for _, s := range series {
			f := s.figure(r)
			cells = append(cells, text.Ratio(f.MMIO), text.Count(f.IOPS))
		}
		t.Add(cells...)
	}
	return t.String()
}

// Plot draws the rows into w: MMIO per I/O on the left, IOPS on the right. format is what a file's name ends with: svg or png.
func Plot(w io.Writer, rows []Row, name string) error {
	const width, height = 9 * vg.Inch, 3.2 * vg.Inch
	bells, err := chart(rows, "doorbell writes (MMIO) per I/O", func(f Figure) float64 { return f.MMIO })
	if err != nil {
		return err
	}
	bells.Y.Scale, bells.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	bells.Legend.Top = false
	bells.Legend.Left = true
	iops, err := chart(rows, "4 KiB random reads per second", func(f Figure) float64 { return f.IOPS })
	if err != nil {
		return err
	}
	iops.Y.Min = 0
	iops.Legend = plot.NewLegend()
	c, err := draw.NewFormattedCanvas(width, height, strings.TrimPrefix(filepath.Ext(name), "."))
	if err != nil {
		return fmt.Errorf("%s: %w (use a name that ends in .svg or .png)", name, err)
	}
	dc := draw.New(c)
	dc.SetColor(color.White)
	dc.Fill(dc.Rectangle.Path())
	tiles := draw.Tiles{Rows: 1, Cols: 2, PadX: vg.Points(18), PadTop: vg.Points(6), PadBottom: vg.Points(6), PadLeft: vg.Points(6), PadRight: vg.Points(10)}
	bells.Draw(tiles.At(dc, 0, 0))
	iops.Draw(tiles.At(dc, 1, 0))
	_, err = c.WriteTo(w)
	return err
}

func chart(rows []Row, title string, value func(Figure) float64) (*plot.Plot, error) {
	plot.DefaultFont.Variant = "Sans"
	p := plot.New()
	p.Title.Text, p.X.Label.Text = title, "queue depth"
	p.Title.Padding = vg.Points(4)
	p.Title.TextStyle.Font.Size, p.Legend.TextStyle.Font.Size = font.Points(11), font.Points(10)
	p.X.Scale = plot.LogScale{}
	var ticks plot.ConstantTicks
	for _, r := range rows {
		ticks = append(ticks, plot.Tick{Value: float64(r.Depth), Label: fmt.Sprint(r.Depth)})
	}
	p.X.Tick.Marker = ticks
	p.Add(plotter.NewGrid())
	for _, s := range series {
		var xys plotter.XYs
		for _, r := range rows {
			// A logarithm has no 0: what rang less than once in a million is drawn there.
			xys = append(xys, plotter.XY{X: float64(r.Depth), Y: max(value(s.figure(r)), 1e-6)})
		}
		line, points, err := plotter.NewLinePoints(xys)
		if err != nil {
			return nil, err
		}
		line.Color, points.Color, points.Shape = s.color, s.color, s.shape
		line.Width, points.Radius = vg.Points(1.6), vg.Points(3)
		p.Add(line, points)
		p.Legend.Add(s.name, line, points)
	}
	return p, nil
}
