package main

import (
	"slices"
	"testing"
)

func TestNSIDList(t *testing.T) {
	for text, want := range map[string]nsidList{"all": nil, "1": {1}, "3,1": {3, 1}} {
		var l nsidList
		if err := l.UnmarshalText([]byte(text)); err != nil || !slices.Equal(l, want) {
			t.Errorf("%s: %v, %v", text, l, err)
		}
	}
	for _, text := range []string{"", "0", "1,1", "4294967295", "x", "1,"} {
		var l nsidList
		if err := l.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was taken: %v", text, l)
		}
	}
}
