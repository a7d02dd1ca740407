package doctor_test

import (
	"fmt"
	"log"
	"strings"

	"github.com/shadowbell/shadowbell/ebpf/doctor"
)

// What nvmetrace doctor --record has written is judged anywhere.
func ExampleDiagnose() {
	const queue = `{"qid":3,"cqid":3,"size":32,"cq_size":32,"state":"armed","armed_at_ns":100000000,"arm_index":9,"arm_saw":9,"commands":9,"vector":-1,` +
		`"sq":{"private":9,"page":17,"event":9,"asked":9},"cq":{}}`
	var file strings.Builder
	for _, taken := range []int{1, 2, 3} {
		fmt.Fprintf(&file, `{"version":1,"taken_ns":%d00000000,"controllers":[{"socket":"guest","shared":true,"enables":1,"config_enable":1,"queues":[%s]}]}`+"\n", taken+40, queue)
	}
	samples, err := doctor.Read(strings.NewReader(file.String()))
	if err != nil {
		log.Fatal(err)
	}
	for _, f := range doctor.Diagnose(samples) {
		fmt.Println(f.Verdict, f.Rule, f.Side)
		fmt.Println(f.Text)
	}
	// Output:
	// broken R1 driver
	// queue 3: tail 17 in the page, event index 9, device asleep since 4.2 s, consumed 9: the driver stored its tail and did not ring although 9 is in [9,17): R1 in the guest's driver
}
