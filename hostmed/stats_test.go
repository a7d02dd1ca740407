package hostmed

import (
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
)

func TestStats(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	m := serve(t, Config{Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}, Doorbells: Trap}}})
	if _, err := m.Stats(socket + "x"); err == nil {
		t.Error("a socket that nobody has was found")
	}
	if _, err := m.Stats(socket); err == nil {
		t.Error("there are counters without a client")
	}
	c := open(t, socket, guestdrv.Options{})
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	before, err := m.Stats(socket)
	if err != nil {
		t.Fatal(err)
	}
	const commands = 20
	for i := range int64(commands) {
		if _, err := ns.WriteAt(random(t, 4096), i*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := ns.WriteZeroes(t.Context(), 0, 4096); err != nil { // the driver sends no Flush to what has no cache
		t.Fatal(err)
	}
	after, err := m.Stats(socket)
	if err != nil {
		t.Fatal(err)
	}
	d := after.Sub(before)
	if d.Writes != commands || d.BytesWritten != commands*4096 || d.Others != 1 || d.Commands() != commands+1 || d.Reads != 0 || d.Errors != 0 {
		t.Errorf("%+v", d)
	}
	if err := ns.Discard(t.Context(), 0, 4096); err != nil {
		t.Fatal(err)
	}
	if s, err := m.Stats(socket); err != nil || s.Emulated != 1 || s.Native != 0 { // memory knows no Dataset Management
		t.Errorf("%+v, %v", s, err)
	}
	if d.SQDoorbells != commands+1 {
		t.Errorf("%d SQ doorbells for %d commands, one after the other", d.SQDoorbells, commands+1)
	}
	c.Close()
	for {
		if _, err := m.Stats(socket); err != nil {
			break
		}
	}
}
