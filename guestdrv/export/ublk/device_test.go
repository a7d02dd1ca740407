package ublk

import (
	"errors"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
)

// fewQueues is a disk that has some queue pairs.
type fewQueues struct {
	*memdisk.Disk
	left int
	made []*fakeNVMe
}

func (f *fewQueues) NewQueue(depth int) (export.Queue, error) {
	if f.left == 0 {
		return nil, errDead
	}
	f.left--
	f.made = append(f.made, &fakeNVMe{size: depth, fd: 5})
	return f.made[len(f.made)-1], nil
}
func (f *fewQueues) Again(error) bool { return false }

// TestQueuesOfTheDiskOrItsMethods: a device has as many queues as the disk has pairs. If these are too few for one that is there already, the methods serve.
func TestQueuesOfTheDiskOrItsMethods(t *testing.T) {
	plain := memdisk.New(8, 512)
	for name, c := range map[string]struct {
		has, least, most int // has -1: no export.Queued
		want             int
		pairs            bool
	}{
		"enough":                 {4, 1, 2, 2, true},
		"fewer":                  {1, 1, 2, 1, true},
		"none left":              {0, 1, 2, 2, false},
		"too few for a recovery": {1, 2, 2, 2, false},
		"a disk without":         {-1, 1, 2, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			few := &fewQueues{Disk: plain, left: c.has}
			var disk export.Disk = few
			if c.has < 0 {
				disk = plain
			}
			d := &Device{char: -1}
			if err := d.takeQueues(disk, c.least, c.most, 8); err != nil {
				t.Fatal(err)
			}
			if len(d.queues) != c.want || (d.Unqueued() == nil) != c.pairs {
				t.Errorf("%d queues, and the disk's are not used because of %v", len(d.queues), d.Unqueued())
			}
			if c.has >= 0 && !c.pairs && !errors.Is(d.Unqueued(), errDead) {
				t.Errorf("why there are no more is not in %v", d.Unqueued())
			}
			for _, q := range d.queues {
				if _, fake := q.nvme.(*fakeNVMe); fake != c.pairs {
					t.Errorf("queue %d is a %T", q.id, q.nvme)
				}
			}
			for _, q := range few.made {
				if q.closed == c.pairs {
					t.Errorf("a pair of the disk is closed: %v", q.closed)
				}
			}
			if err := d.release(); err != nil {
				t.Error(err)
			}
			for _, q := range few.made {
				if !q.closed {
					t.Error("a pair of the disk is left")
				}
			}
		})
	}
}
