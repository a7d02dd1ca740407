package ctrl

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// background has a command run in the background until the returned function is called.
func (h *host) background() (end func(error), cid uint16, finished *int) {
	h.cid++
	release := make(chan error, 1)
	finished = new(int)
	h.c.background(&nvme.Command{CID: h.cid}, func() error { return <-release }, func(err error) result {
		*finished++
		if err != nil {
			return failErr(nvme.StatusInternalError, nowhere, "test", err)
		}
		return result{dw0: 42}
	})
	return func(err error) { release <- err }, h.cid, finished
}

func TestBackgroundCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := testConfig()
		woken := make(chan bool, 100)
		cfg.Wake = func() { woken <- true }
		h := newEnabled(t, cfg)
		end, cid, _ := h.background()
		h.identify(nvme.CNSController, 0) // others go on meanwhile
		interrupts := h.dp.interrupts
		end(nil)
		<-woken
		h.c.AdminKick()
		if es := h.reap(); len(es) != 1 || es[0].CID() != cid || es[0].Result() != 42 || !es[0].Status().OK() || h.dp.interrupts != interrupts+1 {
			t.Errorf("%+v, %d interrupts", es, h.dp.interrupts-interrupts)
		}
		end, cid, _ = h.background()
		end(errors.New("no medium"))
		<-woken
		h.c.AdminKick()
		if es := h.reap(); len(es) != 1 || es[0].CID() != cid || es[0].Status().Code() != nvme.StatusInternalError {
			t.Errorf("%+v", es)
		}
		if e := h.errorEntries(1)[0]; e.CID != cid || e.Status().Code() != nvme.StatusInternalError {
			t.Errorf("error log %+v", e)
		}
	})
}

// A reset does not wait for what runs in the background, and what it comes to has no completion in the new queue.
func TestBackgroundCommandAndReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newEnabled(t, testConfig())
		var ends []func(error)
		var counts []*int
		for range asyncLimit {
			end, _, n := h.background()
			ends, counts = append(ends, end), append(counts, n)
		}
		cid := h.push(identifyCmd(nvme.CNSController, 0))
		h.ring()
		if es := h.reap(); len(es) != 0 {
			t.Errorf("more than %d commands are under way: %+v", asyncLimit, es)
		}
		ends[0](nil)
		synctest.Wait()
		h.ring()
		if es := h.reap(); len(es) != 2 || es[1].CID() != cid {
			t.Errorf("%+v", es)
		}
		h.disable()
		h.enable()
		for _, end := range ends[1:] {
			end(nil)
		}
		synctest.Wait()
		h.identify(nvme.CNSController, 0) // do wants no other completion
		for i, n := range counts {
			if *n != 1 {
				t.Errorf("command %d was finished %d times", i, *n)
			}
		}
		if h.c.async.running != 0 {
			t.Errorf("%d commands in the background", h.c.async.running)
		}
	})
}

func TestPostAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t, testConfig())
		done := 0
		h.c.Post(func() { done++ })
		h.c.AdminKick()
		stop := h.c.after(time.Second, func() { done += 10 })
		h.c.after(2*time.Second, func() { done += 100 })
		stop()
		time.Sleep(3 * time.Second)
		h.c.AdminKick()
		h.c.Close()
		h.c.Post(func() { done += 1000 })
		h.c.AdminKick()
		if done != 101 {
			t.Errorf("%d, want 101: posted, and the timer that was not stopped", done)
		}
	})
}
