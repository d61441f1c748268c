package index

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

func record(config string) *Record {
	return &Record{
		ID: digest.FromString(config), Config: []byte(config), Layers: []digest.Digest{digest.FromString("l")},
		Tags: []Name{{Name: "docker.io/library/x:v1", Seq: 7}},
	}
}

func TestLoadSetsDamagedAside(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "index"))
	if _, _, err := d.Load(); err != nil {
		t.Fatal(err)
	}
	good, bad := record(`{"a":1}`), record(`{"b":2}`)
	for _, r := range []*Record{good, bad} {
		if err := d.Save(r); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(d.path(bad.ID))
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(d.path(bad.ID), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(string(d), ".x.tmp-1"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got, damaged, err := d.Load()
	if err != nil || len(got) != 1 || got[0].ID != good.ID || got[0].Tags[0].Seq != 7 || len(damaged) != 1 {
		t.Fatalf("%v %v %v", got, damaged, err)
	}
	if _, err := os.Stat(filepath.Join(string(d), "quarantine", filepath.Base(d.path(bad.ID)))); err != nil {
		t.Error(err)
	}
	if _, damaged, _ := d.Load(); len(damaged) != 0 {
		t.Errorf("reported twice: %v", damaged)
	}
	for range 2 { // a missing record is no error
		if err := d.Delete(good.ID); err != nil {
			t.Error(err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	b, err := Encode(record("{}"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1,"sum":"","image":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := Decode(b); err == nil && r.ID.Algorithm().FromBytes(r.Config) != r.ID {
			t.Error("accepted a config that does not match")
		}
	})
}
