package podfiles

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/sandbox/model"
)

func TestHostname(t *testing.T) {
	for name, ok := range map[string]bool{
		"web-0": true, "web-0.ns.svc.cluster.local": true, strings.Repeat("a", 64): true,
		"": false, strings.Repeat("a", 65): false, "a b": false, "a\nb": false, "a\x00": false,
		"a#b": false, "a/b": false, "é": false, "a\x7f": false,
	} {
		b, err := Hostname(name)
		if ok && (err != nil || string(b) != name+"\n") {
			t.Errorf("%q: got %q, %v", name, b, err)
		}
		if !ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, want an invalid argument", name, err)
		}
	}
}

func TestHosts(t *testing.T) {
	b, err := Hosts("web-0.svc.local", []string{"10.0.0.2", "fd00::2"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"127.0.0.1\tlocalhost\n", "10.0.0.2\tweb-0.svc.local\tweb-0\n", "fd00::2\tweb-0.svc.local\tweb-0\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("hosts lacks %q:\n%s", want, b)
		}
	}
	for _, bad := range []string{"", "10.0.0.2\n1.1.1.1 evil", "fe80::1%eth0", "host"} {
		if _, err := Hosts("a", []string{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("address %q: got %v", bad, err)
		}
	}
}

func TestResolvConf(t *testing.T) {
	b, err := ResolvConf(&model.DNS{Servers: []string{"10.96.0.10", "fe80::1%eth0"}, Searches: []string{"a.local", "b"}, Options: []string{"ndots:5", "edns0"}})
	want := "search a.local b\nnameserver 10.96.0.10\nnameserver fe80::1%eth0\noptions ndots:5 edns0\n"
	if err != nil || string(b) != want {
		t.Fatalf("got %q, %v; want %q", b, err, want)
	}
	if b, err := ResolvConf(&model.DNS{}); err != nil || len(b) != 0 {
		t.Errorf("empty config: got %q, %v; want an empty file", b, err)
	}
	for _, bad := range []model.DNS{
		{Servers: []string{"1.1.1.1\nnameserver 2.2.2.2"}}, {Servers: []string{"dns.example"}}, {Servers: []string{"fe80::1%a\nb"}},
		{Searches: []string{"a\nnameserver 2.2.2.2"}}, {Searches: []string{"a b"}}, {Searches: []string{""}},
		{Options: []string{"ndots:5\n"}}, {Options: []string{"x\x00"}}, {Options: []string{"a;b"}},
	} {
		if _, err := ResolvConf(&bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, want an invalid argument", bad, err)
		}
	}
}

func TestHostResolvConf(t *testing.T) {
	dir := t.TempDir()
	host, real := filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "real.conf")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want string) {
		t.Helper()
		if b, err := fromHost(host, real); err != nil || string(b) != want {
			t.Fatalf("got %q, %v; want %q", b, err, want)
		}
	}
	check("")
	write(host, "nameserver 127.0.0.53\n")
	check("nameserver 127.0.0.53\n") // no better list exists
	write(real, "nameserver 192.0.2.1\n")
	check("nameserver 192.0.2.1\n")
	write(host, "nameserver 127.0.0.53\nnameserver 192.0.2.9\n")
	check("nameserver 127.0.0.53\nnameserver 192.0.2.9\n")
	write(host, strings.Repeat("#", maxResolvConf+1))
	if _, err := fromHost(host, real); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Fatalf("oversize file: got %v", err)
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("1.1.1.1", "local", "ndots:1")
	f.Fuzz(func(t *testing.T, server, search, option string) {
		b, err := ResolvConf(&model.DNS{Servers: []string{server}, Searches: []string{search}, Options: []string{option}})
		if err == nil && strings.Count(string(b), "\n") != 3 {
			t.Fatalf("a value added a line: %q", b)
		}
	})
}
