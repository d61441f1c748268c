package config

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestFlagBeatsFileBeatsDefault(t *testing.T) {
	file := write(t, "root = \"/a\"\nstate = \"/b\"\n[network]\npool = 9\n[streaming]\nidle_timeout = \"5m\"\n")
	l, err := Load(file, false, map[string]string{"root": "/c", "log_level": "debug"})
	if err != nil {
		t.Fatal(err)
	}
	if l.Root != "/c" || l.State != "/b" || l.Socket != DefaultSocket || l.Network.Pool != 9 || l.Streaming.IdleTimeout.Duration != 5*time.Minute {
		t.Errorf("got %+v", l.Config)
	}
	for key, want := range map[string]string{
		"root": "flag --root", "log_level": "flag --log-level", "state": "file " + file, "network.pool": "file " + file,
		"socket": "default", "network.subnets": "default",
	} {
		if l.Origin[key] != want {
			t.Errorf("origin of %s: %q, want %q", key, l.Origin[key], want)
		}
	}
}

func TestMissingFile(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "no.toml")
	if _, err := Load(gone, true, nil); err != nil {
		t.Errorf("the default file may be absent: %v", err)
	}
	if _, err := Load(gone, false, nil); err == nil || !strings.Contains(err.Error(), gone) {
		t.Errorf("a named file must be there, got %v", err)
	}
}

func TestBadFiles(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"typo", "\nrot = \"/a\"", `:2: unknown key "rot"; did you mean "root"?`},
		{"swap", "sokcet = \"/a\"", `did you mean "socket"?`},
		{"dashes", "cni-conf-dir = \"/a\"", `did you mean "cni_conf_dir"?`},
		{"typo in a table", "[network]\npol = 1", `:2: unknown key "network.pol"; did you mean "network.pool"?`},
		{"wrong table", "[images]\nsupervisor = \"/a\"", `did you mean "runtime.supervisor"?`},
		{"unknown table", "[netwrk]\npool = 1", `did you mean "network`},
		{"far off", "wallpaper = 1", `unknown key "wallpaper"`},
		{"syntax", "root = ", ":1:"},
		{"type", "root = 1", ":1:"},
		{"relative", "root = \"a\"", "root: \"a\" is not an absolute path"},
		{"level", "log_level = \"loud\"", "error, warn, info, debug, trace"},
		{"cidr", "[network]\nsubnets = [\"ten\"]", "network.subnets"},
		{"two of a family", "[network]\nsubnets = [\"10.0.0.0/8\", \"10.1.0.0/16\"]", "2 IPv4"},
		{"address", "metrics_address = \"9100\"", "host:port"},
		{"long socket", "socket = \"/" + strings.Repeat("s", 200) + "\"", "at most 107"},
		{"runtime without a path", "[runtimes.runc]\nargs = []", "runtimes.runc.path: missing"},
		{"runtime by name", "[runtimes.runc]\npath = \"runc\"", `runtimes.runc.path: "runc" is not an absolute path`},
		{"runtime's name", "[runtimes.Run_C]\npath = \"/a\"", "no handler name"},
		{"runtime of ours", "[runtimes.berth]\npath = \"/a\"", "built-in runtime"},
		{"typo in a runtime", "[runtimes.runc]\npaht = \"/a\"", `unknown key "runtimes.runc.paht"; did you mean "runtimes.runc.path"?`},
		{"runtime's time", "[runtimes.runc]\npath = \"/a\"\ntimeout = \"-1s\"", "runtimes.runc.timeout: -1s is negative"},
		{"plugin time", "[network]\nplugin_timeout = \"0s\"", "network.plugin_timeout"},
		{"duration", "[streaming]\nidle_timeout = \"soon\"", ":2:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(write(t, tt.text), false, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to contain %q", err, tt.want)
			}
		})
	}
}

// What is printed is a file that gives the same configuration.
func TestWriteRoundTrip(t *testing.T) {
	l, err := Load("/nonexistent", true, map[string]string{"root": "/r"})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := l.Write(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "# flag --root") || !strings.Contains(b.String(), "# default") {
		t.Errorf("origins are missing:\n%s", b.String())
	}
	again, err := Load(write(t, b.String()), false, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	if again.Root != "/r" || again.Network.Pool != l.Network.Pool || again.Streaming.IdleTimeout != l.Streaming.IdleTimeout {
		t.Errorf("got %+v, want %+v", again.Config, l.Config)
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"root", "rot", 1}, {"socket", "sokcet", 1}, {"abc", "xyz", 3}} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q %q: %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestRuntimes(t *testing.T) {
	file := write(t, "[runtimes.runc]\npath = \"/usr/sbin/runc\"\n[runtimes.crun]\npath = \"/usr/bin/crun\"\nargs = [\"--cgroup-manager=cgroupfs\"]\ntimeout = \"1m\"\n")
	l, err := Load(file, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c := l.Runtimes["crun"]; c.Path != "/usr/bin/crun" || len(c.Args) != 1 || c.Timeout.Duration != time.Minute {
		t.Errorf("got %+v", c)
	}
	var b bytes.Buffer
	if err := l.Write(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\n[runtimes.crun]\npath = '/usr/bin/crun'", "\n[runtimes.runc]\npath = '/usr/sbin/runc'"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, &b)
		}
	}
	// What is printed can be read.
	again, err := Load(write(t, b.String()), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c := again.Runtimes["crun"]; c.Timeout.Duration != time.Minute || again.Runtimes["runc"].Path != "/usr/sbin/runc" {
		t.Errorf("read again: %+v", again.Runtimes)
	}
	if got := l.Map()["runtimes.runc.path"]; got != "/usr/sbin/runc" {
		t.Errorf("in the status: %v", got)
	}
}
