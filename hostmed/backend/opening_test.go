package backend

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// An open that takes long is an error in time that names the medium and what it waits for, and has its result later.
func TestOpening(t *testing.T) {
	for spec, want := range map[string]string{
		"nvme:/dev/ng0n1,offset=1GiB":    "/sys/class/nvme",
		"block:/dev/nvme0n1p1":           "partition table",
		"vfio:0000:01:00.0":              "resets the function",
		"file:/srv/a.img":                "file system",
		"fault:drop,over=file:/srv/a.im": "file system",
	} {
		s, err := ParseSpec(spec)
		if err != nil {
			t.Fatal(err)
		}
		go1, failure := make(chan bool), errors.New("no such device")
		o := Begin(s, func(got Spec) (Backend, error) {
			<-go1
			if got != s {
				t.Errorf("%v is opened in place of %v", got, s)
			}
			return nil, failure
		})
		_, err = o.Within(time.Millisecond)
		if !errors.Is(err, ErrSlow) || !strings.Contains(err.Error(), s.String()) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", spec, err)
		}
		close(go1)
		if _, err := o.Result(); err != failure {
			t.Errorf("%s: %v", spec, err)
		}
		if _, err := o.Within(0); err != failure {
			t.Errorf("%s: in time at last: %v", spec, err)
		}
	}
}
