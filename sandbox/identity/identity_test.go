package identity

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/sandbox/model"
)

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\nweb:x:1000:1001:Web:/home/web:/bin/sh\n" +
		"1000:x:0:0::/evil:\n4294967296:x:0:0::/evil:\nbig:x:4294967296:0::/:\nrel:x:7:7::home:\n"
	group = "root:x:0:\nweb:x:1001:\nstaff:x:50:web,other\nwheel:x:10:root, web\nbad:x:99999999999:web\nhuge:x:4294967295:\n"
)

// layer makes a layer directory; a value starting with "->" is a symlink.
func layer(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, ok := strings.CutPrefix(text, "->"); ok {
			err = os.Symlink(to, p)
		} else {
			err = os.WriteFile(p, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func base(t *testing.T) string {
	return layer(t, map[string]string{"etc/passwd": passwd, "etc/group": group})
}

func p(n int64) *int64 { return &n }

func TestImageUser(t *testing.T) {
	l := []string{base(t)}
	for _, c := range []struct {
		user   string
		uid    uint32
		gid    uint32
		groups []uint32
		home   string
		bad    bool
	}{
		{user: "", groups: []uint32{0, 10}, home: "/root"},
		{user: "0", groups: []uint32{0, 10}, home: "/root"},
		{user: "1", uid: 1, groups: []uint32{0}, home: "/"},
		{user: "1:2", uid: 1, gid: 2, groups: []uint32{2}, home: "/"},
		{user: "01", uid: 1, groups: []uint32{0}, home: "/"},
		{user: "1000", uid: 1000, gid: 1001, groups: []uint32{1001, 10, 50}, home: "/home/web"},
		{user: "web", uid: 1000, gid: 1001, groups: []uint32{1001, 10, 50}, home: "/home/web"},
		{user: "web:9", uid: 1000, gid: 9, groups: []uint32{9, 10, 50}, home: "/home/web"},
		{user: "web:staff", uid: 1000, gid: 50, groups: []uint32{50, 10}, home: "/home/web"},
		{user: "web:", uid: 1000, gid: 1001, groups: []uint32{1001, 10, 50}, home: "/home/web"},
		{user: ":staff", uid: 0, gid: 50, groups: []uint32{50, 10}, home: "/root"},
		{user: "rel", uid: 7, gid: 7, groups: []uint32{7}, home: "/"},
		{user: "4294967294", uid: 4294967294, groups: []uint32{0}, home: "/"},
		{user: "4294967295", bad: true},
		{user: "4294967296", bad: true},
		{user: "99999999999999999999999", bad: true},
		{user: "1 ", bad: true},
		{user: " 1", bad: true},
		{user: "-1", bad: true},
		{user: "+1", bad: true},
		{user: "1:-1", bad: true},
		{user: "nobody", bad: true},
		{user: "web:nogroup", bad: true},
		{user: "web:huge", bad: true},
		{user: "big", bad: true},
		{user: "web:1:2", bad: true},
		{user: "0x1", bad: true},
		{user: "web\n", bad: true},
	} {
		got, home, err := Resolve(l, c.user, model.Security{})
		if c.bad {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: got %+v, %v; want an invalid argument", c.user, got, err)
			}
			continue
		}
		want := model.Identity{UID: c.uid, GID: c.gid, Groups: c.groups}
		if err != nil || !reflect.DeepEqual(got, want) || home != c.home {
			t.Errorf("%q: got %+v, %q, %v; want %+v, %q", c.user, got, home, err, want, c.home)
		}
	}
}

func TestRequestedUser(t *testing.T) {
	l := []string{base(t)}
	for name, c := range map[string]struct {
		sec  model.Security
		want model.Identity
		bad  string
	}{
		"uid replaces the image's user and group": {sec: model.Security{RunAsUser: p(5)}, want: model.Identity{UID: 5, Groups: []uint32{0}}},
		"uid of an account":                       {sec: model.Security{RunAsUser: p(1000)}, want: model.Identity{UID: 1000, GID: 1001, Groups: []uint32{1001, 10, 50}}},
		"uid and gid":                             {sec: model.Security{RunAsUser: p(1000), RunAsGroup: p(3)}, want: model.Identity{UID: 1000, GID: 3, Groups: []uint32{3, 10, 50}}},
		"name":                                    {sec: model.Security{RunAsUsername: "web"}, want: model.Identity{UID: 1000, GID: 1001, Groups: []uint32{1001, 10, 50}}},
		"merge":                                   {sec: model.Security{RunAsUsername: "web", SupplementalGroups: []int64{7, 50, 7, 1001}}, want: model.Identity{UID: 1000, GID: 1001, Groups: []uint32{1001, 7, 10, 50}}},
		"strict":                                  {sec: model.Security{RunAsUsername: "web", StrictGroups: true, SupplementalGroups: []int64{7}}, want: model.Identity{UID: 1000, GID: 1001, Groups: []uint32{1001, 7}}},
		"strict alone":                            {sec: model.Security{RunAsUser: p(1000), StrictGroups: true}, want: model.Identity{UID: 1000, GID: 1001, Groups: []uint32{1001}}},
		"both":                                    {sec: model.Security{RunAsUser: p(1), RunAsUsername: "web"}, bad: "run_as_user"},
		"group alone":                             {sec: model.Security{RunAsGroup: p(1)}, bad: "run_as_group"},
		"negative":                                {sec: model.Security{RunAsUser: p(-1)}, bad: "run_as_user"},
		"too big":                                 {sec: model.Security{RunAsUser: p(1 << 32)}, bad: "run_as_user"},
		"group too big":                           {sec: model.Security{RunAsUser: p(1), RunAsGroup: p(1<<32 - 1)}, bad: "run_as_group"},
		"no such name":                            {sec: model.Security{RunAsUsername: "nobody"}, bad: "nobody"},
		"number as name":                          {sec: model.Security{RunAsUsername: "1000"}, bad: "run_as_username"},
		"bad supplemental":                        {sec: model.Security{SupplementalGroups: []int64{1, -2}}, bad: "supplemental_groups[1]"},
	} {
		got, _, err := Resolve(l, "web:staff", c.sec)
		if c.bad != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.bad) {
				t.Errorf("%s: got %+v, %v; want an error naming %q", name, got, err, c.bad)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %+v, %v; want %+v", name, got, err, c.want)
		}
	}
}

func TestMergedView(t *testing.T) {
	lower := base(t)
	canary := layer(t, map[string]string{"passwd": "web:x:0:0::/:\n"})
	one := func(uid string) string { return "web:x:" + uid + ":1::/:\n" }
	for name, c := range map[string]struct {
		top   map[string]string
		setup func(top string) error
		uid   uint32
		bad   bool
	}{
		"lower":            {uid: 1000},
		"top wins":         {top: map[string]string{"etc/passwd": one("5")}, uid: 5},
		"link inside":      {top: map[string]string{"etc/passwd": "->../lib/users", "lib/users": one("6")}, uid: 6},
		"absolute link":    {top: map[string]string{"etc/passwd": "->/lib/users", "lib/users": one("6")}, uid: 6},
		"link over root":   {top: map[string]string{"etc/passwd": "->../../../../../lib/users", "lib/users": one("6")}, uid: 6},
		"link to a lower":  {top: map[string]string{"etc": "->usr/etc", "usr/etc/passwd": one("8")}, uid: 8},
		"link to the host": {top: map[string]string{"etc/passwd": "->" + canary + "/passwd"}, bad: true},
		"loop":             {top: map[string]string{"etc/passwd": "->passwd"}, bad: true},
		"whiteout": {setup: func(top string) error {
			return unix.Mknod(filepath.Join(mkdir(top, "etc"), "passwd"), unix.S_IFCHR, 0)
		}, bad: true},
		"whiteout of the directory": {setup: func(top string) error { return unix.Mknod(filepath.Join(top, "etc"), unix.S_IFCHR, 0) }, bad: true},
		"opaque directory": {setup: func(top string) error {
			return unix.Setxattr(mkdir(top, "etc"), "trusted.overlay.opaque", []byte("y"), 0)
		}, bad: true},
		"fifo":      {setup: func(top string) error { return unix.Mkfifo(filepath.Join(mkdir(top, "etc"), "passwd"), 0o644) }, bad: true},
		"directory": {setup: func(top string) error { mkdir(top, "etc/passwd"); return nil }, bad: true},
		"device": {setup: func(top string) error {
			return unix.Mknod(filepath.Join(mkdir(top, "etc"), "passwd"), unix.S_IFCHR, int(unix.Mkdev(1, 5)))
		}, bad: true},
		"sparse giant": {setup: func(top string) error {
			f := filepath.Join(mkdir(top, "etc"), "passwd")
			if err := os.WriteFile(f, nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(f, 1<<30)
		}, bad: true},
		"long line": {top: map[string]string{"etc/passwd": strings.Repeat("a", maxLine+1) + "\n"}, bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("needs root: whiteouts are device nodes")
			}
			top := layer(t, c.top)
			if c.setup != nil {
				if err := c.setup(top); err != nil {
					t.Fatal(err)
				}
			}
			start := time.Now()
			got, _, err := Resolve([]string{top, lower}, "web", model.Security{})
			if d := time.Since(start); d > time.Second {
				t.Errorf("took %v", d)
			}
			if c.bad {
				if !errdefs.IsInvalidArgument(err) {
					t.Fatalf("got %+v, %v; want an invalid argument", got, err)
				}
			} else if err != nil || got.UID != c.uid {
				t.Fatalf("got %+v, %v; want uid %d", got, err, c.uid)
			}
		})
	}
}

func mkdir(dir, name string) string {
	full := filepath.Join(dir, name)
	_ = os.MkdirAll(full, 0o755) // a failure shows in what is made inside
	return full
}

func TestNoDescriptorIsLeaked(t *testing.T) {
	top := layer(t, map[string]string{"etc/passwd": "->../a/../lib/users", "a/x": "", "lib/users": "web:x:1:1::/:\n"})
	l := []string{top, base(t)}
	count := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	before := count()
	for range 50 {
		_, _, _ = Resolve(l, "web", model.Security{})
		_, _, _ = Resolve(l, "nobody", model.Security{})
	}
	if after := count(); after > before {
		t.Fatalf("%d descriptors before, %d after", before, after)
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add([]byte(passwd), []byte(group), "web")
	f.Add([]byte("a:b:c"), []byte("::::"), "1:2")
	f.Fuzz(func(t *testing.T, passwd, group []byte, name string) {
		u, err := parseUser(name)
		if err != nil {
			return
		}
		a, found, err := findAccount(passwd, u)
		if err == nil && found && u.name == "" && a.uid != u.id {
			t.Fatalf("user %q became uid %d", name, a.uid)
		}
		if found && (a.home == "" || a.home[0] != '/') {
			t.Fatalf("home %q", a.home)
		}
		gid, err := primaryGroup(group, u, model.Security{}, a.gid)
		if err != nil {
			return
		}
		if all, err := allGroups(group, a.name, gid, model.Security{}); err == nil && all[0] != gid {
			t.Fatalf("groups %v lack the primary group %d first", all, gid)
		}
	})
}

func BenchmarkResolve(b *testing.B) {
	dir := b.TempDir()
	var layers []string
	for _, n := range []string{"a", "b", "c", "d", "e"} {
		layers = append(layers, mkdir(dir, n))
	}
	etc := mkdir(layers[4], "etc")
	if err := os.WriteFile(filepath.Join(etc, "passwd"), []byte(passwd), 0o644); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(etc, "group"), []byte(group), 0o644); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, _, err := Resolve(layers, "web", model.Security{}); err != nil {
			b.Fatal(err)
		}
	}
}
