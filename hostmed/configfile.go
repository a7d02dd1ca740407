package hostmed

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// The configuration file: TOML, strict. What is wrong is said with line and column, in one line.

type configFile struct {
	State     string            `toml:"state"`
	CPUs      []int             `toml:"cpus"`
	Poll      string            `toml:"poll"`
	Log       string            `toml:"log"`
	Control   string            `toml:"control"`
	Unsafe    bool              `toml:"unsafe_no_iommu"`
	Subsystem []subsystemInFile `toml:"subsystem"`
}

type subsystemInFile struct {
	NQN        string             `toml:"nqn"`
	Serial     string             `toml:"serial"`
	Model      string             `toml:"model"`
	Pool       poolInFile         `toml:"pool"`
	Controller []controllerInFile `toml:"controller"`
	Namespace  []namespaceInFile  `toml:"namespace"`
}

type poolInFile struct {
	Dir      string `toml:"dir"`
	Capacity size   `toml:"capacity"`
}

type controllerInFile struct {
	ID        *uint16 `toml:"id"`
	Socket    string  `toml:"socket"`
	Doorbells string  `toml:"doorbells"`
	DSTRD     uint8   `toml:"dstrd"`
	Queues    *uint16 `toml:"queues"`
	Depth     *uint32 `toml:"depth"`
	MDTS      size    `toml:"mdts"`
	Manage    bool    `toml:"management"`

	Limits limitsInFile `toml:"limits"`
}

type namespaceInFile struct {
	NSID        *uint32   `toml:"nsid"`
	Spec        string    `toml:"spec"`
	Shared      bool      `toml:"shared"`
	Controllers *[]uint16 `toml:"controllers"`
	UUID        string    `toml:"uuid"`

	Limits limitsInFile `toml:"limits"`
}

// size is "1MiB" or a number of bytes.
type size struct{ text string }

func (s *size) UnmarshalText(t []byte) error {
	s.text = string(t)
	return nil
}

// LoadConfig reads a configuration file and checks all that can be checked without opening anything. The error is one line
// that begins with file, line and column.
func LoadConfig(path string) (Config, error) {
	doc, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	return parseConfig(path, doc)
}

func parseConfig(name string, doc []byte) (Config, error) {
	var f configFile
	d := toml.NewDecoder(bytes.NewReader(doc)).DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return Config{}, explainTOML(name, err)
	}
	c, err := f.config()
	if err == nil {
		_, err = c.subsystems()
	}
	if err != nil {
		return Config{}, placed(name, doc, err)
	}
	return c, nil
}

// explainTOML turns the decoder's errors into one line.
func explainTOML(name string, err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		e := &unknown.Errors[0]
		line, col := e.Position()
		key := e.Key()
		hint, known := nearest(key)
		text := fmt.Sprintf("%s:%d:%d: %s is no key that hostmed knows", name, line, col, strings.Join(key, "."))
		if hint != "" {
			return fmt.Errorf("%s; did you mean %s?", text, hint)
		}
		return fmt.Errorf("%s; those here are %s", text, strings.Join(known, ", "))
	}
	var syntax *toml.DecodeError
	if errors.As(err, &syntax) {
		line, col := syntax.Position()
		text := strings.TrimPrefix(syntax.Error(), "toml: ")
		if key := syntax.Key(); len(key) > 0 {
			text = strings.Join(key, ".") + ": " + text
		}
		return fmt.Errorf("%s:%d:%d: %s", name, line, col, text)
	}
	return fmt.Errorf("%s: %w", name, err)
}

// nearest returns the key that key's last part was meant to be, if one is near, and all that there are in its table.
func nearest(key []string) (hint string, known []string) {
	t := reflect.TypeFor[configFile]()
	for _, part := range key[:len(key)-1] {
		for i := range t.NumField() {
			if f := t.Field(i); f.Tag.Get("toml") == part && tableOf(f.Type) != nil {
				t = tableOf(f.Type)
				break
			}
		}
	}
	best := 3 // more edits than that are another word
	look := func(t reflect.Type, note bool) {
		for i := range t.NumField() {
			k := t.Field(i).Tag.Get("toml")
			if note {
				known = append(known, k)
			}
			if d := edits(key[len(key)-1], k); d < best && d < len(k) {
				best, hint = d, k
			}
		}
	}
	look(t, true)
	// The decoder does not say which inline table a key is in.
	for i := range t.NumField() {
		if inner := tableOf(t.Field(i).Type); inner != nil && t.Field(i).Type.Kind() == reflect.Struct {
			look(inner, false)
		}
	}
	return hint, known
}

// tableOf returns the struct that a field of type t holds, or a list of; nil: the field is a value.
func tableOf(t reflect.Type) reflect.Type {
	if t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() == reflect.Struct && t != reflect.TypeFor[size]() {
		return t
	}
	return nil
}

// edits is how many letters have to be inserted, deleted or changed to make b of a.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// fieldError is a wrong value. path is where a configuration file has it, as in subsystem[0].controller[1].mdts.
type fieldError struct {
	path string
	err  error
}

func (e *fieldError) Error() string { return e.err.Error() }
func (e *fieldError) Unwrap() error { return e.err }

func wrongField(path, format string, a ...any) error {
	return &fieldError{path, fmt.Errorf(format, a...)}
}

// placed adds the place of a fieldError: that of the key, or of the table if the key is not there.
func placed(name string, doc []byte, err error) error {
	var f *fieldError
	if !errors.As(err, &f) {
		return fmt.Errorf("%s: %w", name, err)
	}
	at := places(doc)
	for path := f.path; path != ""; {
		if p, ok := at[path]; ok {
			return fmt.Errorf("%s:%d:%d: %w", name, p.Line, p.Column, err)
		}
		path = path[:max(strings.LastIndexByte(path, '.'), 0)]
	}
	return fmt.Errorf("%s:1:1: %w", name, err)
}

// places returns where each key and each table of doc, which is valid TOML, begins.
func places(doc []byte) map[string]unstable.Position {
	at := map[string]unstable.Position{}
	lengths := map[string]int{} // of arrays of tables
	var p unstable.Parser
	p.Reset(doc)
	table := ""
	join := func(prefix, key string) string {
		if prefix == "" {
			return key
		}
		return prefix + "." + key
	}
	for p.NextExpression() {
		e := p.Expression()
		path := table
		if e.Kind != unstable.KeyValue {
			path = ""
		}
		var where unstable.Position
		for it, first := e.Key(), true; it.Next(); first = false {
			n := it.Node()
			if first {
				where = p.Shape(n.Raw).Start
			}
			path = join(path, string(n.Data))
			if count, ok := lengths[path]; ok && !(e.Kind == unstable.ArrayTable && it.IsLast()) {
				path = fmt.Sprintf("%s[%d]", path, count-1)
			}
		}
		if e.Kind == unstable.ArrayTable {
			lengths[path]++
			path = fmt.Sprintf("%s[%d]", path, lengths[path]-1)
		}
		if e.Kind != unstable.KeyValue {
			table = path
		}
		at[path] = where
	}
	return at
}

var doorbellModes = map[string]DoorbellMode{"": Shadow, "shadow": Shadow, "trap": Trap, "mmap": Mmap}

// config turns the file into what New takes. What a zero would leave to chance is refused here: in the file a key that is
// absent is the only way to ask for the default.
func (f *configFile) config() (Config, error) {
	c := Config{State: f.State, CPUs: f.CPUs, LogLevel: f.Log, Control: f.Control, UnsafeNoIOMMU: f.Unsafe}
	for i, cpu := range f.CPUs {
		if cpu < 0 || cpu >= 1024 {
			return c, wrongField("cpus", "cpus: %d is not a CPU: they are 0 to 1023", cpu)
		}
		for _, other := range f.CPUs[:i] {
			if other == cpu {
				return c, wrongField("cpus", "cpus: %d is in it twice: one worker is pinned to each", cpu)
			}
		}
	}
	if f.Poll != "" {
		d, err := time.ParseDuration(f.Poll)
		if err != nil || d == 0 {
			return c, wrongField("poll", "poll: %q is not a time: write it as 250us or 1ms", f.Poll)
		}
		if err := checkPoll(d); err != nil {
			return c, wrongField("poll", "%w", err)
		}
		c.Poll = d
	}
	if f.Log != "" && hclog.LevelFromString(f.Log) == hclog.NoLevel {
		return c, wrongField("log", "log: %q is not a level: use trace, debug, info, warn or error", f.Log)
	}
	if len(f.Subsystem) == 0 {
		return c, errors.New("there is no [[subsystem]]: without one there is nothing to serve")
	}
	for i, s := range f.Subsystem {
		sub := SubsystemConfig{NQN: s.NQN, Serial: s.Serial, Model: s.Model}
		path := fmt.Sprintf("subsystem[%d]", i)
		if t := s.Pool.Capacity.text; t != "" || s.Pool.Dir != "" {
			var err error
			if sub.Pool.Capacity, err = backend.ParseSize(t); err != nil || sub.Pool.Capacity == 0 {
				return c, wrongField(path+".pool.capacity", "pool: capacity %q is not a size: say how much guests may create in all, as in 1TiB", t)
			}
			sub.Pool.Dir = s.Pool.Dir
		}
		for j, x := range s.Controller {
			cc, err := x.config(fmt.Sprintf("%s.controller[%d]", path, j))
			if err != nil {
				return c, err
			}
			sub.Controllers = append(sub.Controllers, cc)
		}
		for j, x := range s.Namespace {
			n, err := x.config(fmt.Sprintf("%s.namespace[%d]", path, j))
			if err != nil {
				return c, err
			}
			sub.Namespaces = append(sub.Namespaces, n)
		}
		c.Subsystems = append(c.Subsystems, sub)
	}
	return c, nil
}

func (x *controllerInFile) config(path string) (ControllerConfig, error) {
	c := ControllerConfig{Socket: x.Socket, DSTRD: x.DSTRD, Management: x.Manage}
	if x.Socket == "" {
		return c, wrongField(path+".socket", "the controller has no socket: give it a path, as in socket = \"/run/vm1.sock\"")
	}
	var ok bool
	if c.Doorbells, ok = doorbellModes[x.Doorbells]; !ok {
		return c, wrongField(path+".doorbells", "doorbells: %q is not a mode: use shadow, trap or mmap", x.Doorbells)
	}
	if x.ID != nil {
		if c.ID = *x.ID; c.ID == 0 {
			return c, wrongField(path+".id", "id: controller ids are 1 to %d", maxCNTLID)
		}
	}
	if x.Queues != nil {
		if c.Queues = *x.Queues; c.Queues == 0 {
			return c, wrongField(path+".queues", "queues: a controller has 1 to %d", maxQueues)
		}
	}
	if x.Depth != nil {
		if c.Depth = *x.Depth; c.Depth == 0 {
			return c, wrongField(path+".depth", "depth: a queue has 2 to 65536 entries")
		}
	}
	if x.MDTS.text != "" {
		n, err := backend.ParseSize(x.MDTS.text)
		if err != nil || n == 0 {
			return c, wrongField(path+".mdts", "mdts: %q is not a size: use a power of two from 8KiB to 1MiB", x.MDTS.text)
		}
		c.MDTS = n
	}
	var err error
	c.Limits, err = x.Limits.config(path + ".limits")
	return c, err
}

func (x *namespaceInFile) config(path string) (NamespaceConfig, error) {
	n := NamespaceConfig{Spec: x.Spec, Shared: x.Shared, UUID: x.UUID}
	if x.Spec == "" {
		return n, wrongField(path+".spec", "the namespace has no spec: say where its bytes are, as in spec = \"file:/srv/disk.img\"")
	}
	if x.NSID != nil {
		if n.NSID = *x.NSID; n.NSID == 0 {
			return n, wrongField(path+".nsid", "nsid: namespace ids are 1 to 1024")
		}
	}
	if x.Controllers != nil {
		n.Controllers = append([]uint16{}, *x.Controllers...)
	}
	var err error
	n.Limits, err = x.Limits.config(path + ".limits")
	return n, err
}
