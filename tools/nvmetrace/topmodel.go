package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// frame is what top shows of one interval.
type frame struct {
	seconds float64 // of the interval
	elapsed float64 // since the start
	nodes   []*node
	lost    trace.Losses // since the start
	notes   []string     // what is not shown, and why
}

// endMsg ends the table.
type endMsg struct{}

// topModel is the live table. It is driven by keys and frames only, so that a test can play both.
type topModel struct {
	title    string
	shown    frame // what is on the screen
	latest   frame // what came last; another one only while paused
	any      bool  // there is a frame
	paused   bool
	path     []string // names of the nodes that were opened
	selected string   // "device/queue" of the selected line, beneath path
	sort     int      // index of columns; -1: natural order
	rising   bool
	idle     bool // show what does nothing
	help     bool
	width    int
	height   int
}

func newTopModel(title string) topModel {
	return topModel{title: title, sort: -1, width: 80, height: 24}
}

// Init is part of tea.Model.
func (m topModel) Init() tea.Cmd { return nil }

// Update is part of tea.Model.
func (m topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case frame:
		m.latest, m.any = msg, true
		if !m.paused {
			m.shown = msg
		}
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case endMsg:
		return m, tea.Quit
	case tea.KeyPressMsg:
		return m.key(msg.String())
	}
	return m, nil
}

func (m topModel) key(k string) (tea.Model, tea.Cmd) {
	lines := m.lines()
	at := max(slices.IndexFunc(lines, func(l topLine) bool { return l.id == m.selected }), 0)
	move := func(to int) {
		if len(lines) > 0 {
			m.selected = lines[min(max(to, 0), len(lines)-1)].id
		}
	}
	switch k {
	case "q", "ctrl+c":
		return m, tea.Quit
	case "up", "k":
		move(at - 1)
	case "down", "j":
		move(at + 1)
	case "pgup":
		move(at - m.room())
	case "pgdown":
		move(at + m.room())
	case "home", "g":
		move(0)
	case "end", "G":
		move(len(lines) - 1)
	case "enter", "right", "l":
		if at < len(lines) && len(lines[at].node.Parts) > 0 {
			m.path = append(slices.Clone(m.path), strings.Split(lines[at].id, "\x00")...)
			m.selected = ""
		}
	case "esc", "left", "h", "backspace":
		if n := len(m.path); n > 0 {
			m.selected = m.path[n-1]
			m.path = m.path[:n-1]
		}
	case "s", "S":
		step := 1
		if k == "S" {
			step = len(columns)
		}
		m.sort = (m.sort+1+step)%(len(columns)+1) - 1
	case "r":
		m.rising = !m.rising
	case "i":
		m.idle = !m.idle
	case "?":
		m.help = !m.help
	case "p", "space", " ":
		m.paused = !m.paused
		m.shown = m.latest
	}
	return m, nil
}

// topLine is one line of the table.
type topLine struct {
	id    string // names from path to the node
	depth int
	node  *node
}

// lines are what the table has: the parts of the node that path names, and at the top devices with their queues.
func (m topModel) lines() []topLine {
	nodes := m.shown.nodes
	for _, name := range m.path {
		i := slices.IndexFunc(nodes, func(n *node) bool { return n.Name == name })
		if i < 0 {
			return nil // it is idle, or gone
		}
		nodes = nodes[i].Parts
	}
	var out []topLine
	for _, n := range m.sorted(nodes) {
		out = append(out, topLine{n.Name, 0, n})
		if len(m.path) == 0 {
			for _, p := range m.sorted(n.Parts) {
				out = append(out, topLine{n.Name + "\x00" + p.Name, 1, p})
			}
		}
	}
	return out
}

// sorted is nodes in the order that is asked for, without the idle ones unless they are.
func (m topModel) sorted(nodes []*node) []*node {
	out := slices.DeleteFunc(slices.Clone(nodes), func(n *node) bool { return !m.idle && n.QID != nil && !n.busy() })
	if m.sort >= 0 {
		value := columns[m.sort].value
		slices.SortStableFunc(out, func(a, b *node) int {
			if m.rising {
				a, b = b, a
			}
			return cmp.Compare(value(b), value(a))
		})
	} else if m.rising {
		slices.Reverse(out)
	}
	return out
}

var (
	headStyle     = lipgloss.NewStyle().Bold(true)
	dimStyle      = lipgloss.NewStyle().Faint(true)
	lostStyle     = lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Color("1"))
	deviceStyle   = lipgloss.NewStyle().Bold(true)
	selectedStyle = lipgloss.NewStyle().Reverse(true)
)

const (
	topKeys   = "up/down select  enter open  esc back  s sort  r reverse  p pause  ? help  q quit"
	nameLeast = 18
	nameMost  = 40
)

// around is how many lines stand around those of the table: title, head, and the keys.
const around = 3

func (m topModel) room() int {
	return max(m.height-around-len(m.notes()), 1)
}

// notes are lines below the table.
func (m topModel) notes() []string {
	var out []string
	if s := lossText(m.shown.lost); s != "" {
		out = append(out, lostStyle.Render(m.cut(s)))
	}
	for _, n := range m.shown.notes {
		out = append(out, dimStyle.Render(m.cut(n)))
	}
	return out
}

// cut makes s fit on a line.
func (m topModel) cut(s string) string {
	r := []rune(s)
	return string(r[:min(len(r), max(m.width, 1))])
}

// View is part of tea.Model.
func (m topModel) View() tea.View {
	v := tea.NewView(m.content())
	v.AltScreen = true
	v.WindowTitle = "nvmetrace top"
	return v
}

func (m topModel) content() string {
	var b strings.Builder
	title := "nvmetrace top  " + m.title
	if m.any {
		title += fmt.Sprintf("  %.0f s", m.shown.elapsed)
	}
	for _, name := range m.path {
		title += "  > " + name
	}
	if m.paused {
		title += "  PAUSED"
	}
	b.WriteString(headStyle.Render(m.cut(title)) + "\n")
	if m.help {
		b.WriteString(topKeyHelp + "\n" + dimStyle.Render(m.cut(topKeys)))
		return b.String()
	}
	lines := m.lines()
	b.WriteString(headStyle.Render(m.cut(m.head(lines))) + "\n")
	wide, fit := m.layout(lines)
	at := max(slices.IndexFunc(lines, func(l topLine) bool { return l.id == m.selected }), 0)
	room := m.room()
	first := max(0, at-room+1)
	used := 0
	for i := first; i < min(first+room, len(lines)); i++ {
		line := m.cut(m.line(lines[i], wide, fit))
		switch {
		case i == at:
			line = selectedStyle.Render(line)
		case lines[i].depth == 0 && lines[i].node.QID == nil:
			line = deviceStyle.Render(line)
		}
		b.WriteString(line + "\n")
		used++
	}
	if len(lines) == 0 {
		say := "no command yet"
		switch {
		case m.any && len(m.path) > 0:
			say = "nothing happens here"
		case !m.any:
			say = "the first interval is not over"
		}
		b.WriteString(dimStyle.Render(m.cut("  "+say)) + "\n")
		used++
	}
	b.WriteString(strings.Repeat("\n", max(0, room-used)))
	for _, n := range m.notes() {
		b.WriteString(n + "\n")
	}
	b.WriteString(dimStyle.Render(m.cut(topKeys)))
	return b.String()
}

// layout is how wide names are, and which columns are beside them. Where not all fit, those that say nothing of any line go first, and then the last ones.
func (m topModel) layout(lines []topLine) (name int, fit []column) {
	fit = slices.Clone(columns)
	wide := func() (n int) {
		n = nameLeast
		for _, c := range fit {
			n += c.wide
		}
		return n
	}
	for i := len(fit) - 1; i >= 0 && wide() > m.width; i-- {
		if m.sort < 0 || fit[i].head != columns[m.sort].head {
			if !slices.ContainsFunc(lines, func(l topLine) bool { return fit[i].cell(l.node) != "-" }) {
				fit = slices.Delete(fit, i, i+1)
			}
		}
	}
	for len(fit) > 0 && wide() > m.width {
		fit = fit[:len(fit)-1]
	}
	return nameLeast + min(max(m.width-wide(), 0), nameMost-nameLeast), fit
}

func (m topModel) head(lines []topLine) string {
	mark := "v"
	if m.rising {
		mark = "^"
	}
	name := ""
	if m.sort < 0 {
		name = "name " + mark
	}
	wide, fit := m.layout(lines)
	line := fmt.Sprintf("%-*s", wide, name)
	for _, c := range fit {
		h := c.head
		if m.sort >= 0 && h == columns[m.sort].head {
			h += mark
		}
		line += fmt.Sprintf("%*s", c.wide, h)
	}
	return line
}

func (m topModel) line(l topLine, wide int, fit []column) string {
	name := strings.Repeat("  ", l.depth) + l.node.Name
	if l.node.State != "" {
		name += " " + l.node.State
	}
	if r := []rune(name); len(r) > wide {
		name = string(r[:wide-1]) + "~"
	}
	line := fmt.Sprintf("%-*s", wide, name)
	for _, c := range fit {
		line += fmt.Sprintf("%*s", c.wide, c.cell(l.node))
	}
	return line
}

const topKeyHelp = `
  up, down, k, j        select a line            page up, page down, home, end too
  enter, right, l       open it: a device shows its queues, a queue its commands by kind and size
  esc, left, h          back
  s, S                  sort by the next column, the one before; r turns the order round
  i                     show queues that do nothing, or hide them
  p, space              pause: counting goes on
  ?                     this help
  q, Ctrl-C             end, and print the totals

  Columns that do not fit are left out, empty ones first: a wider terminal has them.
  depth   commands under way now; max: at any time since the start
  p50 p99 latencies of what ended in the interval
  t.outs  commands that timed out; resets: of the controller
  MMIO/IO doorbell register writes for each command, of hostmed's controllers (--control)
`

// plainTable is a frame where there is no terminal.
func plainTable(f frame) string {
	t := text.Table{Head: []string{fmt.Sprintf("%.1f s", f.elapsed)}}
	for _, c := range columns {
		t.Head = append(t.Head, c.head)
	}
	m := topModel{shown: f, sort: -1}
	for _, l := range m.lines() {
		name := strings.Repeat("  ", l.depth) + l.node.Name
		if l.node.State != "" {
			name += "  " + l.node.State
		}
		cells := []string{name}
		for _, c := range columns {
			cells = append(cells, c.cell(l.node))
		}
		t.Add(cells...)
	}
	out := t.String()
	if s := lossText(f.lost); s != "" {
		out += "  " + s + "\n"
	}
	for _, n := range f.notes {
		out += "  " + n + "\n"
	}
	return out
}
