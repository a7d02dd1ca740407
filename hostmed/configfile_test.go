package hostmed

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// TestExampleFile keeps docs/hostmed.toml true: it is valid, so is each of its defaults when it stands there, and it has every key.
func TestExampleFile(t *testing.T) {
	const path = "../docs/hostmed.toml"
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	defaults := regexp.MustCompile(`(?m)^# ([a-z]+ = (".*"|\[.*\]|\d+))$`)
	all, err := parseConfig(path, defaults.ReplaceAll(doc, []byte("$1")))
	if err != nil {
		t.Fatalf("with the defaults written out: %v", err)
	}
	first := func(c Config) ControllerConfig {
		list, err := c.subsystems()
		if err != nil {
			t.Fatal(err)
		}
		return list[0].Controllers[0]
	}
	if a, b := first(c), first(all); !reflect.DeepEqual(a, b) {
		t.Errorf("by default %+v, as the file says %+v", a, b)
	}
	var keys func(reflect.Type)
	keys = func(f reflect.Type) {
		for i := range f.NumField() {
			key := f.Field(i).Tag.Get("toml")
			if table := tableOf(f.Field(i).Type); table != nil {
				keys(table)
			} else if !regexp.MustCompile(`(?m)(^|[{,] |^# )` + key + ` = `).Match(doc) {
				t.Errorf("%s does not show %s", path, key)
			}
		}
	}
	keys(reflect.TypeFor[configFile]())
}

// TestConfigErrors: each says where, what, and what would be right, in one line.
func TestConfigErrors(t *testing.T) {
	const rest = `
[[subsystem]]
[[subsystem.controller]]
socket = "/s"
[[subsystem.namespace]]
spec = "mem:size=1MiB"
`
	if _, err := parseConfig("f", []byte(rest)); err != nil {
		t.Fatal(err)
	}
	second := rest + "\n[[subsystem]]\n"
	for name, c := range map[string]struct {
		doc  string
		says []string
	}{
		"empty":                {"", []string{"f: ", "[[subsystem]]"}},
		"syntax":               {"state = \n", []string{"f:1:"}},
		"unknown at the top":   {"stat = \"x\"\n" + rest, []string{"f:1:1: stat is no key", "did you mean state?"}},
		"unknown in a table":   {rest + "quues = 2\n", []string{"f:7:1: subsystem.namespace.quues", "those here are nsid, spec"}},
		"near in a table":      {strings.Replace(rest, "socket", "sockt", 1), []string{"f:4:1: subsystem.controller.sockt", "did you mean socket?"}},
		"unknown table":        {rest + "[[subsystem.namspace]]\n", []string{"f:7:3: subsystem.namspace", "did you mean namespace?"}},
		"wrong type":           {"cpus = \"2\"\n" + rest, []string{"f:1:8", "cpus"}},
		"too large":            {strings.Replace(rest, "socket", "queues = 70000\nsocket", 1), []string{"f:4:10", "queues"}},
		"cpu":                  {"cpus = [0, 4711]\n" + rest, []string{"f:1:1: cpus: 4711"}},
		"poll":                 {"poll = \"1s\"\n" + rest, []string{"f:1:1: poll: 1s", "100ms"}},
		"poll without unit":    {"poll = \"250\"\n" + rest, []string{"f:1:1: poll: ", "250us"}},
		"control":              {"control = \"/s\"\n" + rest, []string{"f:1:1: control: /s", "another path"}},
		"cpu twice":            {"cpus = [1, 1]\n" + rest, []string{"f:1:1: cpus: 1 is in it twice"}},
		"log":                  {"log = \"loud\"\n" + rest, []string{"f:1:1: log: \"loud\"", "warn"}},
		"no controller":        {"[[subsystem]]\nserial = \"1\"\n", []string{"f:1:3: the subsystem has no controller"}},
		"no socket":            {strings.Replace(rest, "socket = \"/s\"", "", 1), []string{"f:3:3: the controller has no socket"}},
		"empty socket":         {strings.Replace(rest, "/s", "", 1), []string{"f:4:1: the controller has no socket"}},
		"no spec":              {rest + "[[subsystem.namespace]]\nnsid = 4\n", []string{"f:7:3: the namespace has no spec"}},
		"bad spec":             {strings.Replace(rest, "mem:", "men:", 1), []string{"f:6:1: ", "men:size=1MiB", "it must begin with"}},
		"doorbells":            {strings.Replace(rest, "socket", "doorbells = \"bell\"\nsocket", 1), []string{"f:4:1: doorbells: \"bell\"", "shadow, trap or mmap"}},
		"dstrd":                {strings.Replace(rest, "socket", "dstrd = 5\nsocket", 1), []string{"f:4:1: ", "dstrd 5", "0 to 4"}},
		"queues":               {strings.Replace(rest, "socket", "queues = 65\nsocket", 1), []string{"f:4:1: ", "queues 65", "1 to 64"}},
		"no queues":            {strings.Replace(rest, "socket", "queues = 0\nsocket", 1), []string{"f:4:1: ", "queues", "1 to 64"}},
		"depth":                {strings.Replace(rest, "socket", "depth = 1\nsocket", 1), []string{"f:4:1: ", "depth 1", "2 to 65536"}},
		"mdts":                 {strings.Replace(rest, "socket", "mdts = \"100KiB\"\nsocket", 1), []string{"f:4:1: ", "mdts 102400", "8KiB to 1MiB"}},
		"mdts is no size":      {strings.Replace(rest, "socket", "mdts = \"many\"\nsocket", 1), []string{"f:4:1: mdts: \"many\""}},
		"mdts in bytes":        {strings.Replace(rest, "socket", "mdts = 4096\nsocket", 1), []string{"f:4:1: ", "mdts 4096"}},
		"id":                   {strings.Replace(rest, "socket", "id = 65535\nsocket", 1), []string{"f:4:1: ", "id 65535", "65519"}},
		"id 0":                 {strings.Replace(rest, "socket", "id = 0\nsocket", 1), []string{"f:4:1: ", "1 to 65519"}},
		"nsid":                 {rest + "nsid = 1025\n", []string{"f:7:1: ", "nsid 1025", "1 to 1024"}},
		"nsid 0":               {rest + "nsid = 0\n", []string{"f:7:1: ", "1 to 1024"}},
		"nsid twice":           {rest + "[[subsystem.namespace]]\nspec = \"mem:size=2MiB\"\nnsid = 1\n", []string{"f:9:1: nsid 1", "two namespaces"}},
		"no such controller":   {rest + "controllers = [2]\n", []string{"f:7:1: namespace 1", "controller 2, which does not exist", "[1]"}},
		"controller twice":     {rest + "controllers = [1, 1]\n", []string{"f:7:1: namespace 1", "twice"}},
		"uuid":                 {rest + "uuid = \"6f1c3c1e\"\n", []string{"f:7:1: namespace 1", "8-4-4-4-12"}},
		"uuid of zeroes":       {rest + "uuid = \"00000000-0000-0000-0000-000000000000\"\n", []string{"f:7:1: ", "not zero"}},
		"nqn":                  {strings.Replace(rest, "[[subsystem]]\n", "[[subsystem]]\nnqn = \"disk\"\n", 1), []string{"f:3:1: nqn", "nqn."}},
		"serial":               {strings.Replace(rest, "[[subsystem]]\n", "[[subsystem]]\nserial = \"123456789012345678901\"\n", 1), []string{"f:3:1: serial", "20"}},
		"model":                {strings.Replace(rest, "[[subsystem]]\n", "[[subsystem]]\nmodel = \"größer\"\n", 1), []string{"f:3:1: model", "ASCII"}},
		"pool without size":    {strings.Replace(rest, "[[subsystem]]\n", "[[subsystem]]\npool = { dir = \"/p\" }\n", 1), []string{"f:3:1: pool", "1TiB"}},
		"pool without dir":     {strings.Replace(rest, "[[subsystem]]\n", "[[subsystem]]\npool = { capacity = \"1GiB\" }\n", 1), []string{"f:3:1: ", "dir ="}},
		"pool for nobody":      {strings.Replace(rest, "[[subsystem]]\n", "[[subsystem]]\npool = { dir = \"/p\", capacity = \"1GiB\" }\n", 1), []string{"f:3:1: ", "management = true"}},
		"unknown in pool":      {strings.Replace(rest, "[[subsystem]]\n", "[[subsystem]]\npool = { dirr = \"/p\" }\n", 1), []string{"f:3:", "did you mean dir?"}},
		"socket twice":         {second + "[[subsystem.controller]]\nsocket = \"/t\"\n[[subsystem.controller]]\nsocket = \"/s\"\n", []string{"f:12:1: socket /s", "two controllers"}},
		"nqn twice":            {second + "nqn = \"" + nqnOf("/s") + "\"\n[[subsystem.controller]]\nsocket = \"/t\"\n", []string{"f:9:1: NQN", "two subsystems"}},
		"id twice":             {strings.Replace(rest, "[[subsystem.name", "[[subsystem.controller]]\nsocket = \"/t\"\nid = 1\n[[subsystem.name", 1), []string{"f:7:1: controller /t", "id 1"}},
		"a key twice":          {rest + "spec = \"mem:size=2MiB\"\n", []string{"f:7:1"}},
		"not text":             {"\xff\xfe" + rest, []string{"f:1:"}},
		"controllers of text":  {rest + "controllers = [\"a\"]\n", []string{"f:7:"}},
		"a table as a value":   {"state = { dir = \"x\" }\n" + rest, []string{"f:1:"}},
		"deeply nested":        {"state = " + strings.Repeat("[", 100000) + "\n" + rest, []string{"f:"}},
		"no limit":             {rest + "limits = { iops = 0 }\n", []string{"f:7:1: iops", "leave it out"}},
		"limit of what":        {rest + "limits = { iosp = 5 }\n", []string{"f:7:", "did you mean iops?"}},
		"iops in MiB":          {rest + "limits = { write_iops = \"1MiB\" }\n", []string{"f:7:1: write_iops", "2000"}},
		"bandwidth of nothing": {rest + "limits = { bandwidth = 100 }\n", []string{"f:7:1: bandwidth", "100MiB?"}},
		"burst alone":          {strings.Replace(rest, "socket", "limits = { read_iops_burst = 7 }\nsocket", 1), []string{"f:4:1: read_iops_burst", "give read_iops too"}},
		"a subsystem as table": {"[subsystem]\nserial = \"1\"\n", []string{"f"}},
	} {
		_, err := parseConfig("f", []byte(c.doc))
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: more than a line: %q", name, err)
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %q does not say %q", name, err, s)
			}
		}
	}
}

func nqnOf(socket string) string {
	_, nqn := identity(socket)
	return nqn
}

func TestConfigDefaults(t *testing.T) {
	c, err := parseConfig("f", []byte(`
[[subsystem]]
[[subsystem.controller]]
socket = "/a"
[[subsystem.controller]]
socket = "/b"
id = 7
mdts = 65536
[[subsystem.namespace]]
spec = "mem:size=1MiB"
[[subsystem.namespace]]
spec = "mem:size=2MiB"
controllers = []
[[subsystem.namespace]]
spec = "mem:size=3MiB"
controllers = [7]
`))
	if err != nil {
		t.Fatal(err)
	}
	list, err := c.subsystems()
	if err != nil {
		t.Fatal(err)
	}
	s := list[0]
	if s.NQN != nqnOf("/a") || s.Controllers[0].ID != 1 || s.Controllers[1].ID != 7 || s.Controllers[1].MDTS != 65536 || s.Controllers[0].Queues != 64 {
		t.Errorf("%+v", s)
	}
	for i, want := range []NamespaceConfig{
		{NSID: 1, Spec: "mem:size=1MiB", Shared: true, Controllers: []uint16{1, 7}},
		{NSID: 2, Spec: "mem:size=2MiB", Controllers: []uint16{}},
		{NSID: 3, Spec: "mem:size=3MiB", Controllers: []uint16{7}},
	} {
		if !reflect.DeepEqual(s.Namespaces[i], want) {
			t.Errorf("namespace %+v, want %+v", s.Namespaces[i], want)
		}
	}
	if _, err := LoadConfig(filepath.Join(t.TempDir(), "none.toml")); err == nil || !strings.Contains(err.Error(), "none.toml") {
		t.Errorf("a file that is not there: %v", err)
	}
}

func FuzzConfig(f *testing.F) {
	doc, err := os.ReadFile("../docs/hostmed.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte("subsystem = [{controller = [{socket = \"/s\", mdts = 3}]}]\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		if _, err := parseConfig("f", doc); err != nil && (!strings.HasPrefix(err.Error(), "f:") || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%q", err)
		}
	})
}
