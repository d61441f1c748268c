package attacks

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/testimage"
)

// A numeric user is looked up as a name in the image's passwd, which maps it to 0.
// A number is the number.
func TestCVE_2016_3697(t *testing.T) {
	const passwd, group = "1000:x:0:0::/:\n1:x:0:0::/:\n", "1000:x:0:\n0:x:0:1000\n"
	b := newBench(t, "id:")
	b.file("etc/passwd", passwd)
	b.file("etc/group", group)
	b.spec.Process.User = specs.User{UID: 1000, GID: 1000}
	b.run().ok().expect(map[string]string{"id:": "1000 1000 []"})
	b.args("hold:")
	id, _ := b.start()
	b.do("exec", "--user", "1000:1000", id, attackerName, "id:").ok().expect(map[string]string{"id:": "1000 1000 []"})
}

// The same over CRI, where the image names the user, and a name is looked up.
func TestCVE_2016_3697_CRI(t *testing.T) {
	n := needNode(t)
	ref := n.mustPush(t, "numbers", func(c *v1.Config) { c.User = "1000" },
		testimage.Entry{Name: "etc/passwd", Body: []byte("1000:x:0:0::/:\n")}, testimage.Entry{Name: "etc/group", Body: []byte("root:x:0:\n")})
	p := n.runPod(t)
	c := n.config("hold:")
	c.Image.Image = ref
	id := n.start(t, p, c)
	r := n.exec(t, id, "status:Uid", "status:CapEff", "status:CapAmb", "status:CapInh").ok()
	r.expect(map[string]string{"status:Uid": "1000 1000 1000 1000", "status:CapEff": none, "status:CapAmb": none, "status:CapInh": none})
	c = n.config("hold:")
	c.Image.Image = ref
	c.Linux.SecurityContext.RunAsUsername = "1000"
	if err := n.tryStart(t, p, c); err == nil {
		t.Error("run_as_username takes a number")
	}
}

const none = "0000000000000000"

// Capabilities are made ambient for users other than root (CVE-2018-1000400,
// CVE-2018-10856).
// Such a user has none unless the spec says ambient, whatever root would get.
func TestCVE_2016_8867(t *testing.T) {
	want := map[string]string{"status:CapAmb": none, "status:CapInh": none, "status:CapEff": none, "status:CapPrm": none, "status:CapBnd": "00000000a80425fb"}
	ask := []string{"status:CapAmb", "status:CapInh", "status:CapEff", "status:CapPrm", "status:CapBnd"}
	for _, nnp := range []bool{false, true} {
		b := newBench(t, ask...)
		b.spec.Process.NoNewPrivileges = nnp
		b.spec.Process.User = specs.User{UID: 1000, GID: 1000}
		b.run().ok().expect(want)
		b.args("hold:")
		id, _ := b.start()
		b.do(append([]string{"exec", id, attackerName}, ask...)...).ok().expect(want)
	}
}

// The inheritable set is not empty, so that files with inheritable capabilities
// give them to users (CVE-2022-24769, -27649 to -27652, -3466, GHSA-c9cp-9c75-9v8c,
// CVE-2025-27612).
// It is empty in run, exec and exec --cap.
func TestCVE_2022_29162(t *testing.T) {
	for _, uid := range []uint32{0, 1000} {
		b := newBench(t, "status:CapInh", "status:CapAmb")
		b.spec.Process.User.UID = uid
		want := map[string]string{"status:CapInh": none, "status:CapAmb": none}
		b.run().ok().expect(want)
		b.args("hold:")
		id, _ := b.start()
		b.do("exec", id, attackerName, "status:CapInh", "status:CapAmb").ok().expect(want)
		b.do("exec", "--cap", "CAP_SYS_ADMIN", id, attackerName, "status:CapInh", "status:CapAmb").ok().expect(want)
	}
}

// The user of an exec is parsed loosely, so that "1" was root.
// Each string is the number that it reads as, or refused.
func TestCVE_2026_30892(t *testing.T) {
	b := newBench(t, "hold:")
	b.file("etc/passwd", "name:x:7:7::/:\nroot:x:0:0::/:\n")
	b.spec.Process.User = specs.User{UID: 42, GID: 43}
	id, _ := b.start()
	for user, want := range map[string]string{
		"1": "1 43 []", "1:2": "1 2 []", "0": "0 43 []", "0:0": "0 0 []", "01": "1 43 []", "4294967294": "4294967294 43 []",
		"1 ": "", " 1": "", "-1": "", "+1": "", "name": "", "name:9": "", "1:": "", ":1": "", "1:2:3": "", "1:name": "", "0x1": "", "1e1": "", "1_0": "",
		"4294967295": "", "4294967296": "", "18446744073709551616": "", "1:4294967295": "", "1:4294967296": "", "1:-1": "", "\u0661": "",
	} {
		r := b.do("exec", "--user", user, id, attackerName, "id:")
		if want == "" {
			r.refused()
			continue
		}
		r.ok().expect(map[string]string{"id:": want})
	}
	// The same in a config.
	for _, user := range []string{`{"uid": -1, "gid": 0}`, `{"uid": 4294967296, "gid": 0}`, `{"uid": "1", "gid": 0}`, `{"uid": 4294967295, "gid": 0}`, `{"uid": 1.5, "gid": 0}`, `{"uid": 0, "gid": 4294967295}`} {
		id := b.id()
		data, err := json.Marshal(b.spec)
		if err != nil {
			t.Fatal(err)
		}
		before := `"user":{"uid":42,"gid":43}`
		if !strings.Contains(string(data), before) {
			t.Fatalf("no %s in %s", before, data)
		}
		data = []byte(strings.Replace(string(data), before, `"user":`+user, 1))
		if err := os.WriteFile(filepath.Join(b.bundle, "config.json"), data, 0o644); err != nil {
			t.Fatal(err)
		}
		b.do("run", id).refused("user")
	}
}

// The security module's label is not applied, without a word (CVE-2025-64750).
// A profile or label that this machine cannot give is an error, for the first
// process and every other, never unconfined.
func TestCVE_2025_65105(t *testing.T) {
	b := newBench(t, "nothing:")
	plain := *b.spec.Process
	b.spec.Process.ApparmorProfile = "no-such-profile"
	b.run().refused("process.apparmorProfile")
	*b.spec.Process = plain
	b.spec.Process.SelinuxLabel = "system_u:system_r:no_such_t:s0"
	b.run().refused("process.selinuxLabel")
	*b.spec.Process = plain
	b.spec.Linux.MountLabel = "system_u:object_r:no_such_t:s0"
	b.run().refused("mount")
	b.spec.Linux.MountLabel = ""
	b.args("hold:")
	id, _ := b.start()
	b.do("exec", "--apparmor", "no-such-profile", id, attackerName, "nothing:").refused("process.apparmorProfile")
	b.do("exec", "--process-label", "no_such_label", id, attackerName, "nothing:").refused("process.selinuxLabel")
}

// The same over CRI.
func TestCVE_2025_65105_CRI(t *testing.T) {
	n := needNode(t)
	p := n.runPod(t)
	c := n.config("hold:")
	c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "no-such-profile"}
	if err := n.tryStart(t, p, c); err == nil {
		t.Error("a container with an unknown AppArmor profile runs")
	}
}

// Writes to procfs for labels and sysctls are redirected by mounts in a volume
// that two containers share (CVE-2025-62596).
// A spec that covers them is refused, and what is written lands in the private
// procfs: a sysctl has its effect, a decoy keeps its content.
func TestCVE_2025_52881(t *testing.T) {
	decoys := newBench(t)
	fake := filepath.Join(decoys.volume("fake"), "decoy")
	if err := os.WriteFile(fake, []byte("decoy"), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/proc/self/attr", "/proc/self/attr/exec", "/proc/thread-self/attr", "/proc/sys/net/ipv4/ip_forward", "/proc/sys", "/proc/sysrq-trigger", "/proc/1"} {
		b := newBench(t, "nothing:")
		b.bind(fake, p)
		b.run().refused(p)
	}
	ways(t, func(b *bench) {
		b.file("proc/sys/net/ipv4/ip_default_ttl", "decoy")
		b.file("proc/self/oom_score_adj", "decoy")
		b.spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_default_ttl": "77"}
		b.spec.Process.OOMScoreAdj = ptr(321)
		b.args("read:/proc/sys/net/ipv4/ip_default_ttl", "read:/proc/self/oom_score_adj")
		b.run().ok().expect(map[string]string{"read:/proc/sys/net/ipv4/ip_default_ttl": "77|", "read:/proc/self/oom_score_adj": "321|"})
		for _, f := range []string{"proc/sys/net/ipv4/ip_default_ttl", "proc/self/oom_score_adj"} {
			if got, _ := os.ReadFile(b.in(f)); string(got) != "decoy" {
				t.Errorf("%s of the image: %q", f, got)
			}
		}
	})
}
