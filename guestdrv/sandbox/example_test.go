package sandbox_test

import (
	"fmt"
	"os"

	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
)

// A program's main function.
func Example() {
	sandbox.Reexec(sandbox.Options{})

	in, err := os.Open("image.raw") // everything that is needed later is opened now
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	report, err := sandbox.Enter(sandbox.Policy{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	for _, m := range report.Missing() {
		fmt.Fprintln(os.Stderr, "warning:", m)
	}
	_ = in // read it, drive queues
}
