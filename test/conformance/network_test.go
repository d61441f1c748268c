package conformance

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
)

// fetch gets a page, waiting a little for the server to listen.
func fetch(t *testing.T, url string) string {
	t.Helper()
	client := http.Client{Timeout: 2 * time.Second}
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var r *http.Response
		if r, err = client.Get(url); err == nil {
			b, rerr := io.ReadAll(r.Body)
			r.Body.Close()
			if rerr == nil {
				return string(b)
			}
			err = rerr
		}
	}
	t.Fatalf("get %s: %v", url, err)
	return ""
}

func TestPodsReachEachOtherAndTheHostReachesThem(t *testing.T) {
	server, client := runPod(t, nil), runPod(t, nil)
	run(t, server, "serve", ":8080")
	st := podStatus(t, server.id).Network
	addrs := []string{st.Ip}
	for _, a := range st.AdditionalIps {
		addrs = append(addrs, a.Ip)
	}
	v6 := false
	c := run(t, client, "sleep", "1000")
	for _, a := range addrs {
		v6 = v6 || strings.Contains(a, ":")
		url := "http://" + net.JoinHostPort(a, "8080") + "/"
		want := fetch(t, url)
		out, e, code := execSync(t, c, "/bin/prog", "get", net.JoinHostPort(a, "8080"))
		if code != 0 || out != want {
			t.Errorf("pod to pod %s: %d %q %q", url, code, out, e)
		}
	}
	if !v6 {
		t.Errorf("no IPv6 address: %v", addrs)
	}
}

func TestHostPorts(t *testing.T) {
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{
			{Protocol: cri.Protocol_TCP, ContainerPort: 8080, HostPort: 18080},
			{Protocol: cri.Protocol_TCP, ContainerPort: 8081, HostPort: 0},
		}
	})
	run(t, p, "serve", ":8080")
	want := fetch(t, "http://"+net.JoinHostPort(podStatus(t, p.id).Network.Ip, "8080")+"/")
	for _, host := range []string{"127.0.0.1", harness.NodeIP, "[::1]"} {
		if got := fetch(t, "http://"+host+":18080/"); got != want {
			t.Errorf("%s: %q", host, got)
		}
	}
	other := runPod(t, nil)
	c := run(t, other, "sleep", "1000")
	out, e, code := execSync(t, c, "/bin/prog", "get", harness.NodeIP+":18080")
	if code != 0 || out != want {
		t.Errorf("from a pod to the node's address: %d %q %q", code, out, e)
	}
	clash := preparePod(t, func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_TCP, ContainerPort: 1, HostPort: 18080}}
	})
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: clash.config})
	if err == nil {
		clash.id = r.PodSandboxId
		t.Fatal("two pods were given one host port")
	}
	if !strings.Contains(err.Error(), "18080") {
		t.Errorf("err = %v", err)
	}
	if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Fatal(err)
	}
	if conn, err := net.DialTimeout("tcp", "127.0.0.1:18080", time.Second); err == nil {
		conn.Close()
		t.Error("the host port answers after the pod stopped")
	}
}

func TestUDPHostPort(t *testing.T) {
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_UDP, ContainerPort: 9053, HostPort: 19053}}
	})
	c := run(t, p, "listen", "udp", ":9053")
	waitLog(t, c, "listening")
	for _, host := range []string{"127.0.0.1", harness.NodeIP} {
		conn, err := net.Dial("udp", host+":19053")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintln(conn, "ping")
		if err := conn.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if got, err := bufio.NewReader(conn).ReadString('\n'); err != nil || got != "ping\n" {
			t.Errorf("%s: %q, %v", host, got, err)
		}
	}
}

func TestUnknownHandlerIsRefused(t *testing.T) {
	p := preparePod(t, nil)
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: "no-such-handler"})
	if err == nil {
		p.id = r.PodSandboxId
	}
	wantCode(t, err, codes.InvalidArgument, "no-such-handler")
}
