package durable

import (
	"testing"

	"github.com/containerd/errdefs"
)

// TestASealedRecordIsReadWholeOrNotAtAll: of each cut and each flipped bit.
func TestASealedRecordIsReadWholeOrNotAtAll(t *testing.T) {
	type record struct{ Name, Link string }
	want := record{"pod", "berth0a0b0c0d"}
	b, err := Seal(want)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, at int, b []byte) {
		var got record
		if err := Unseal(b, &got); err == nil && got != want {
			t.Errorf("%s %d: read %+v", what, at, got)
		} else if err != nil && !errdefs.IsDataLoss(err) {
			t.Errorf("%s %d: %v", what, at, err)
		}
	}
	var got record
	if err := Unseal(b, &got); err != nil || got != want {
		t.Fatalf("%+v, %v", got, err)
	}
	for n := range b {
		if err := Unseal(b[:n], &got); !errdefs.IsDataLoss(err) {
			t.Errorf("cut at %d: %v", n, err)
		}
		for bit := range 8 {
			flipped := append([]byte(nil), b...)
			flipped[n] ^= 1 << bit
			check("flip of byte", n, flipped)
		}
	}
}
