// Command stress hunts for lost wake-ups. Two threads, or two processes, each on its own core, play the driver and the
// device of one queue pair in real shared memory, with the real code of shared/dbbuf and shared/ring. Both sleep as
// often as they can: the driver on its interrupt, the device on its doorbell. If both ever sleep while there is
// work, a wake-up was lost; the program says who saw what and exits with 1.
//
// With --mutate one barrier is taken out of the handshake, in a copy of the operation (mutate_unsafe.go). The
// program then has to fail within seconds, which shows that a clean run means something.
//
// It measures nothing: the two sides delay themselves at random so that they meet in every way.
//
// Files in the order of a run: main.go (command line), run.go (one case and its watchdog), shared.go (what
// the two sides share), driver.go, device.go, mutate_unsafe.go, report.go.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/alecthomas/kong"

	"github.com/shadowbell/shadowbell/shared/ring"
)

// Exit codes.
const (
	exitOK    = 0
	exitLost  = 1 // a wake-up was lost, or a ring was corrupt
	exitUsage = 2
)

// sizes are the ring sizes that a run goes through: the smallest, where each command wraps, and larger ones.
var sizes = []uint32{2, 3, 4, 64, 256, 4096}

type cli struct {
	Size      []uint32 `help:"Ring sizes in entries, ${sizes} by default. Each runs with a CQ as large as the SQ and, from 4 on, with one of half the size, where the device sleeps for lack of room, too." placeholder:"N"`
	Seconds   float64  `help:"Seconds for all sizes together." default:"10"`
	Mutate    string   `help:"Barrier to take out: driver (plain tail store in Publish), device (plain event-index store in Arm), quiet-driver (plain store of the quiet bit), quiet-device (no fence before Quiet looks), or none." placeholder:"WHICH" enum:"none,driver,device,quiet-driver,quiet-device" default:"none"`
	Processes bool     `help:"Device in a process of its own, which gets the memory and the eventfds by descriptor."`
	Seed      uint64   `help:"Seed of the random delays; 0 takes one from the clock. The same seed gives the same delays, not the same meeting of the two sides."`
	JSON      bool     `name:"json" help:"Print the result as one JSON object."`

	Device deviceFlags `embed:"" prefix:"device-"`
}

// deviceFlags are how a run with --processes starts the other half.
type deviceFlags struct {
	Parent int    `hidden:""`
	Sq     uint32 `hidden:""`
	Cq     uint32 `hidden:""`
	Cpu    int    `hidden:"" default:"-1"`
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is main with its surroundings as arguments; it returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	var c cli
	exited := -1 // kong prints the help and then calls exit
	parser, err := kong.New(&c, kong.Name("stress"),
		kong.Description("Two-sided stress of the doorbell handshake on shared memory: fails when a wake-up is lost."),
		kong.Vars{"sizes": fmt.Sprint(sizes)}, kong.Writers(stdout, stderr), kong.Exit(func(code int) { exited = code }))
	if err != nil {
		fmt.Fprintf(stderr, "stress: %v\n", err)
		return exitUsage
	}
	_, err = parser.Parse(args)
	if exited >= 0 {
		return exited
	}
	if err == nil {
		err = c.check()
	}
	if err != nil {
		fmt.Fprintf(stderr, "stress: %v\n", err)
		return exitUsage
	}
	if c.Device.Parent != 0 {
		if err := runDeviceProcess(&c); err != nil {
			fmt.Fprintf(stderr, "stress: device: %v\n", err)
			return exitLost
		}
		return exitOK
	}
	if c.Seed == 0 {
		c.Seed = uint64(time.Now().UnixNano())
	}
	res, err := runAll(&c)
	if res != nil {
		if c.JSON {
			enc := json.NewEncoder(stdout)
			enc.SetIndent("", "  ")
			if err := enc.Encode(res); err != nil {
				fmt.Fprintf(stderr, "stress: %v\n", err)
				return exitUsage
			}
		} else {
			res.print(stdout)
		}
	}
	var lost *lostError
	switch {
	case errors.As(err, &lost):
		fmt.Fprintf(stderr, "stress: %v\n%s", err, lost.sides)
		return exitLost
	case err != nil:
		fmt.Fprintf(stderr, "stress: %v\n", err)
		return exitLost
	}
	return exitOK
}

func (c *cli) check() error {
	for _, s := range c.Size {
		if s < ring.MinSize || s > maxRing {
			return fmt.Errorf("--size %d: rings of %d to %d entries", s, ring.MinSize, maxRing)
		}
	}
	if c.Seconds <= 0 || c.Seconds > 1e6 {
		return fmt.Errorf("--seconds %v: more than 0", c.Seconds)
	}
	return nil
}
