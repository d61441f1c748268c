package imageservice

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/berth-runtime/berth/internal/leftover"
)

// TestLeftovers plants a layer of no image, a folder that is no layer, one named by
// somebody else and half a pull, beside an image that is there and one that a
// container uses although it was removed.
func TestLeftovers(t *testing.T) {
	h := newHub(t)
	for _, mode := range []string{"running", "offline"} {
		t.Run(mode, func(t *testing.T) {
			root := t.TempDir()
			s := newService(t, root)
			for _, name := range []string{"kept", "used", "gone"} {
				push(t, h.host()+"/"+name+":1", imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{name: name}))))
			}
			pull := func(name string) *Image {
				img, err := s.Pull(t.Context(), PullRequest{Ref: h.host() + "/" + name + ":1"})
				if err != nil {
					t.Fatal(err)
				}
				return img
			}
			kept, used, gone := pull("kept"), pull("used"), pull("gone")
			if _, err := s.Acquire(string(used.ID), "container"); err != nil {
				t.Fatal(err)
			}
			if err := s.Remove(t.Context(), string(used.ID)); err != nil {
				t.Fatal(err)
			}
			copyTo := func(from, to string) {
				t.Helper()
				if err := os.CopyFS(to, os.DirFS(from)); err != nil {
					t.Fatal(err)
				}
			}
			// What a killed removal leaves: the record first, then the layer.
			layer := filepath.Dir(gone.Layers[0])
			stranger := filepath.Join(root, "layers", "lost+found")
			torn := filepath.Join(root, "layers", strings.Replace(digest.FromString("torn").String(), ":", "-", 1))
			half := filepath.Join(root, "staging", "layer-123")
			for _, d := range []string{stranger, torn, half} {
				if err := os.MkdirAll(filepath.Join(d, "fs"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			saved := filepath.Join(t.TempDir(), "layer")
			copyTo(layer, saved)
			if err := s.Remove(t.Context(), string(gone.ID)); err != nil {
				t.Fatal(err)
			}
			copyTo(saved, layer)
			working, err := s.layers.Stage()
			if err != nil {
				t.Fatal(err)
			}
			look := func() []leftover.Finding {
				t.Helper()
				found, err := s.Leftovers(t.Context())
				if mode == "offline" {
					found, err = Look(root, func(id string) bool { return id == string(used.ID) })
				}
				if err != nil {
					t.Fatal(err)
				}
				return found
			}
			if mode == "offline" { // nobody works then
				if err := working.Discard(); err != nil {
					t.Fatal(err)
				}
			}
			found := look()
			var names []string
			for _, f := range found {
				if f.Kind != leftover.ImageLayer || f.Detail == "" {
					t.Errorf("%+v", f)
				}
				names = append(names, f.Name)
				if f.Name == stranger {
					if f.Remove != nil || f.Remedy == "" {
						t.Errorf("another's folder would be removed: %+v", f)
					}
					continue
				}
				if _, err := os.Stat(f.Name); err != nil {
					t.Errorf("looking removed it: %v", err)
				}
				if err := f.Remove(t.Context()); err != nil {
					t.Errorf("%s: %v", f.Name, err)
				}
			}
			slices.Sort(names)
			if want := []string{layer, stranger, torn, half}; !slices.Equal(names, sorted(want)) {
				t.Errorf("found\n%q, want\n%q", names, sorted(want))
			}
			if left := look(); len(left) != 1 || left[0].Name != stranger {
				t.Errorf("left %+v", left)
			}
			if mode == "running" {
				if _, err := os.Stat(working.FS()); err != nil {
					t.Errorf("what a pull works on was removed: %v", err)
				}
				if pull("gone"); content(t, pull("gone"), "gone") != "gone" {
					t.Error("the image cannot be pulled again")
				}
			}
			if content(t, kept, "kept") != "kept" || content(t, used, "used") != "used" {
				t.Error("an image lost its layers")
			}
		})
	}
}

func sorted(s []string) []string { slices.Sort(s); return s }

// TestLookSaysWhatIsBroken: an image without its layer, and a record that cannot be
// read, are reported and left alone; a removed image that nobody uses can go.
func TestLookSaysWhatIsBroken(t *testing.T) {
	h := newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	images := map[string]*Image{}
	for _, name := range []string{"whole", "broken", "removed"} {
		push(t, h.host()+"/"+name+":1", imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{name: name}))))
		img, err := s.Pull(t.Context(), PullRequest{Ref: h.host() + "/" + name + ":1"})
		if err != nil {
			t.Fatal(err)
		}
		images[name] = img
	}
	if _, err := s.Acquire(string(images["removed"].ID), "container"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), string(images["removed"].ID)); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(filepath.Dir(images["broken"].Layers[0]), "layer.json")); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(root, "index", "sha256-"+strings.Repeat("0", 64)+".json")
	if err := os.WriteFile(bad, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	look := func(used string) map[string]leftover.Finding {
		found, err := Look(root, func(id string) bool { return id == used })
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]leftover.Finding{}
		for _, f := range found {
			out[f.Name] = f
		}
		return out
	}
	got := look(string(images["removed"].ID))
	if f := got[string(images["broken"].ID)]; len(got) != 2 || f.Remove != nil || !strings.Contains(f.Detail, "broken:1") || got[bad].Kind != leftover.Record {
		t.Errorf("found %+v", got)
	}
	got = look("")
	f := got[string(images["removed"].ID)]
	if f.Remove == nil {
		t.Fatalf("found %+v", got)
	}
	if err := f.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, ok := look("")[string(images["removed"].ID)]; ok {
		t.Error("still there")
	}
}

// TestLookKeepsLayersOfADamagedRecord: a container may run on them.
func TestLookKeepsLayersOfADamagedRecord(t *testing.T) {
	h := newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	push(t, h.host()+"/used:1", imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{"used": "used"}))))
	img, err := s.Pull(t.Context(), PullRequest{Ref: h.host() + "/used:1"})
	if err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(root, "index", strings.Replace(string(img.ID), ":", "-", 1)+".json")
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := Look(root, func(id string) bool { return id == string(img.ID) })
	if err != nil || len(found) != 2 {
		t.Fatalf("found %+v, %v", found, err)
	}
	for _, f := range found {
		if f.Remove != nil || f.Remedy == "" {
			t.Errorf("%+v", f)
		}
	}
}
