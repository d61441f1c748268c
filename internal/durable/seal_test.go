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
		got = record{}
		if err := UnsealOld(b, &got); err == nil && got != want {
			t.Errorf("%s %d: read as an old one %+v", what, at, got)
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

// TestAnOldRecordIsRead: one without a checksum.
func TestAnOldRecordIsRead(t *testing.T) {
	var got struct{ Name string }
	if err := UnsealOld([]byte(`{"Name":"pod"}`), &got); err != nil || got.Name != "pod" {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "{", `{"Name":3}`, `{"sha256":"","body":{"Name":"x"}}`} {
		if err := UnsealOld([]byte(bad), &got); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
