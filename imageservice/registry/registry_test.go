package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

// recorder is a server that keeps what it was asked.
type recorder struct {
	*httptest.Server
	mu   sync.Mutex
	seen []*http.Request
}

func serve(t *testing.T, tls bool, f http.HandlerFunc) *recorder {
	r := &recorder{}
	h := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.mu.Lock()
		r.seen = append(r.seen, q.Clone(context.Background()))
		r.mu.Unlock()
		f(w, q)
	})
	if tls {
		r.Server = httptest.NewUnstartedServer(h)
		r.Config.ErrorLog = nil
		r.StartTLS()
	} else {
		r.Server = httptest.NewServer(h)
	}
	t.Cleanup(r.Close)
	return r
}

func (r *recorder) host() string { u, _ := url.Parse(r.URL); return u.Host }

func (r *recorder) authorized() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, q := range r.seen {
		if q.Header.Get("Authorization") != "" {
			n++
		}
	}
	return n
}

func repo(t *testing.T, dir, ref string, creds *Credentials) (*Repository, reference.Named) {
	t.Helper()
	n, err := reference.ParseDockerRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	c := New(Config{Dir: dir, Attempts: 3, Backoff: time.Millisecond, HeaderTimeout: time.Second, IdleTimeout: time.Second})
	t.Cleanup(c.Close)
	r, err := c.Repository(n, creds, func(host string) bool { return host == reference.Domain(n) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r, n
}

func hosts(t *testing.T, domain, text string) string {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, domain), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, domain, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func blobOf(s string) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromString(s), Size: int64(len(s))}
}

func read(r *Repository, d ocispec.Descriptor) (string, error) {
	b, err := r.Blob(context.Background(), d, nil)
	if err != nil {
		return "", err
	}
	defer b.Close()
	out, err := io.ReadAll(b)
	return string(out), err
}

func TestAuthentication(t *testing.T) {
	userpass := &Credentials{Username: "u", Password: "s3cret"}
	for _, tt := range []struct {
		name  string
		creds *Credentials
		basic bool
		want  func(error) bool
	}{
		{"basic", userpass, true, nil},
		{"basic, wrong", &Credentials{Username: "u", Password: "wrong-s3cret"}, true, errdefs.IsUnauthorized},
		{"basic, none", nil, true, errdefs.IsUnauthorized},
		{"bearer by password", userpass, false, nil},
		{"bearer by refresh token", &Credentials{IdentityToken: "refresh-s3cret"}, false, nil},
		{"bearer given", &Credentials{RegistryToken: "token-s3cret"}, false, nil},
		{"bearer given, wrong", &Credentials{RegistryToken: "other-s3cret"}, false, errdefs.IsUnauthorized},
		{"bearer anonymous", nil, false, errdefs.IsUnauthorized},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var srv *recorder
			srv = serve(t, false, func(w http.ResponseWriter, r *http.Request) {
				user, pass, _ := r.BasicAuth()
				good := user == "u" && pass == "s3cret"
				if r.URL.Path == "/token" {
					if r.Method == http.MethodPost {
						_ = r.ParseForm()
						good = r.Form.Get("grant_type") == "refresh_token" && r.Form.Get("refresh_token") == "refresh-s3cret"
					}
					if !good || r.FormValue("scope") != "repository:a/b:pull" || r.FormValue("service") != "reg" {
						w.WriteHeader(401)
						fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":"password %s is wrong"}]}`, pass)
						return
					}
					fmt.Fprint(w, `{"access_token":"token-s3cret","expires_in":300}`)
					return
				}
				if tt.basic && good || !tt.basic && r.Header.Get("Authorization") == "Bearer token-s3cret" {
					fmt.Fprint(w, "data")
					return
				}
				if tt.basic {
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				} else {
					w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="reg",scope="repository:a/b:pull"`, srv.URL))
				}
				w.WriteHeader(401)
			})
			r, _ := repo(t, "", srv.host()+"/a/b:v1", tt.creds)
			got, err := read(r, blobOf("data"))
			if tt.want == nil && (err != nil || got != "data") {
				t.Fatalf("%q, %v", got, err)
			}
			if tt.want != nil && !tt.want(err) {
				t.Fatalf("error %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "s3cret") {
				t.Errorf("secret in %v", err)
			}
		})
	}
}

// TestTokenExpires takes a new token in the middle of a blob.
func TestTokenExpires(t *testing.T) {
	token := 0
	data := strings.Repeat("0123456789", 1000)
	var srv *recorder
	srv = serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			token++
			fmt.Fprintf(w, `{"token":"t%d"}`, token)
			return
		}
		if token == 0 || r.Header.Get("Authorization") != fmt.Sprintf("Bearer t%d", token) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token"`, srv.URL))
			w.WriteHeader(401)
			return
		}
		if r.Header.Get("Range") == "" {
			token++ // the old one is void from here
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			_, _ = io.WriteString(w, data[:5000])
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 5000-%d/%d", len(data)-1, len(data)))
		w.WriteHeader(206)
		_, _ = io.WriteString(w, data[5000:])
	})
	r, _ := repo(t, "", srv.host()+"/a/b:v1", nil)
	if got, err := read(r, blobOf(data)); err != nil || got != data {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestRealmPolicy: the password must not travel to a token service elsewhere.
func TestRealmPolicy(t *testing.T) {
	other := serve(t, false, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"t"}`) })
	otherURL := strings.Replace(other.URL, "127.0.0.1", "localhost", 1)
	selfSigned := serve(t, true, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"t"}`) })
	for _, realm := range []string{otherURL + "/token", selfSigned.URL, "http://169.254.169.254/latest", "https://169.254.169.254/latest", "https://u:p@x/", "ftp://x/", "", "::"} {
		srv := serve(t, false, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q", realm))
			w.WriteHeader(401)
		})
		r, _ := repo(t, "", srv.host()+"/a/b:v1", &Credentials{Username: "u", Password: "s3cret"})
		_, err := read(r, blobOf("data"))
		if err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("realm %q: %v", realm, err)
		}
		if srv.authorized() != 0 {
			t.Errorf("realm %q: credentials sent without basic challenge", realm)
		}
	}
	if other.authorized()+selfSigned.authorized() != 0 {
		t.Error("credentials sent to a foreign token service")
	}
}

// TestRedirectsCarryNoCredentials: A -> B -> A, with the header only on the way to A.
func TestRedirectsCarryNoCredentials(t *testing.T) {
	var a, b *recorder
	a = serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/back" {
			if r.Header.Get("Authorization") != "" {
				t.Error("credentials sent again after another host")
			}
			fmt.Fprint(w, "data")
			return
		}
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(401)
			return
		}
		http.Redirect(w, r, b.URL+"/there?sig=s3cret", http.StatusTemporaryRedirect)
	})
	b = serve(t, false, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, a.URL+"/back", http.StatusFound) })
	r, _ := repo(t, "", a.host()+"/a/b:v1", &Credentials{Username: "u", Password: "p"})
	if got, err := read(r, blobOf("data")); err != nil || got != "data" {
		t.Errorf("%q, %v", got, err)
	}
	if b.authorized() != 0 {
		t.Error("credentials sent to the redirect's target")
	}
	b.Close()
	if _, err := read(r, blobOf("data")); err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("error %v", err)
	}
}

func TestPlainHTTPOnlyWhereConfigured(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "localhost:5000": true, "127.0.0.1:80": true, "127.9.9.9": true, "[::1]:5000": true,
		"example.com": false, "localhost.example.com": false, "10.0.0.1:5000": false, "127.0.0.1.example.com": false,
	} {
		if loopback(host) != want {
			t.Errorf("loopback(%q) = %v", host, !want)
		}
	}
	h, err := hostsFor("", "example.com:80")
	if err != nil || h[0].base.Scheme != "https" || h[0].guessScheme {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestHostsFile(t *testing.T) {
	const text = `
server = "https://registry.example.com"
ca = "server.crt"

[host."https://b.example.com"]
  capabilities = ["pull", "resolve"]
  skip_verify = true
[host."http://a.example.com:5000/cache/v2"]
  capabilities = ["pull"]
  override_path = true
  ca = ["one.crt", "/two.crt"]
  client = [["c.cert", "c.key"]]
  [host."http://a.example.com:5000/cache/v2".header]
    x-one = "1"
    x-many = ["2", "3"]
`
	got, err := parseHosts([]byte(text), "/etc/x", "example.com")
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0].base.String() != "https://b.example.com/v2" || got[1].base.String() != "http://a.example.com:5000/cache/v2" || got[2].base.String() != "https://registry.example.com/v2" {
		t.Fatalf("%+v", got)
	}
	if !got[0].skipVerify || !got[0].resolve || got[1].resolve || !got[1].pull || !got[2].server || got[2].guessScheme {
		t.Errorf("%+v", got)
	}
	if !reflect.DeepEqual(got[1].ca, []string{"/etc/x/one.crt", "/two.crt"}) || got[1].client[0] != [2]string{"/etc/x/c.cert", "/etc/x/c.key"} || len(got[1].header["x-many"]) != 2 || got[2].ca[0] != "/etc/x/server.crt" {
		t.Errorf("%+v", got[1])
	}
	for _, bad := range []string{"server = 3", "server = \"ftp://x\"", "[host.\"https://u:p@x\"]\n", "[host.\"https://x\"]\ncapabilities=[\"fly\"]", "ca = 3", "client = [[\"a\",\"b\",\"c\"]]", "nonsense"} {
		if _, err := parseHosts([]byte(bad), "/", "example.com"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestMirrors(t *testing.T) {
	srv := serve(t, false, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "data") })
	broken := serve(t, false, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) })
	mirror := serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/a/b/blobs/"+digest.FromString("data").String() || r.URL.Query().Get("ns") != "example.com" {
			t.Errorf("mirror asked for %s", r.URL)
		}
		fmt.Fprint(w, "data")
	})
	text := fmt.Sprintf("server = %q\n[host.%q]\n[host.%q]\n", srv.URL, broken.URL, mirror.URL)
	for _, name := range []string{"example.com", "_default"} {
		r, _ := repo(t, hosts(t, name, text), "example.com/a/b:v1", &Credentials{Username: "u", Password: "p"})
		if got, err := read(r, blobOf("data")); err != nil || got != "data" {
			t.Errorf("%q, %v", got, err)
		}
	}
	if len(srv.seen) != 0 || len(broken.seen) != 2 || len(mirror.seen) != 2 || mirror.authorized() != 0 {
		t.Errorf("server %d, broken %d, mirror %d requests", len(srv.seen), len(broken.seen), len(mirror.seen))
	}
	dir := hosts(t, "example.com_5000_", fmt.Sprintf("server = %q\n", srv.URL))
	r, _ := repo(t, dir, "example.com:5000/a/b:v1", nil)
	if got, err := read(r, blobOf("data")); err != nil || got != "data" {
		t.Errorf("underscore form: %q, %v", got, err)
	}
}

func TestTLSVerification(t *testing.T) {
	srv := serve(t, true, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "data") })
	var verification *tls.CertificateVerificationError
	r, _ := repo(t, "", srv.host()+"/a/b:v1", nil)
	if _, err := read(r, blobOf("data")); !errors.As(err, &verification) {
		t.Errorf("self-signed certificate: %v", err)
	}
	r, _ = repo(t, hosts(t, srv.host(), "skip_verify = true\n"), srv.host()+"/a/b:v1", nil)
	if got, err := read(r, blobOf("data")); err != nil || got != "data" {
		t.Errorf("skip_verify: %v", err)
	}
	dir := hosts(t, srv.host(), "ca = \"ca.crt\"\n")
	crt := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(dir, srv.host(), "ca.crt"), crt, 0o644); err != nil {
		t.Fatal(err)
	}
	r, _ = repo(t, dir, srv.host()+"/a/b:v1", nil)
	if got, err := read(r, blobOf("data")); err != nil || got != "data" {
		t.Errorf("ca: %v", err)
	}
}

func TestParseDocument(t *testing.T) {
	d := digest.FromString("x").String()
	desc := func(mt string) string { return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":1}`, mt, d) }
	cfg, lay := desc(ocispec.MediaTypeImageConfig), desc(ocispec.MediaTypeImageLayerGzip)
	m, x := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	for _, tt := range []struct {
		name, body, ct string
		ok             bool
	}{
		{"manifest", `{"config":` + cfg + `,"layers":[` + lay + `]}`, m, true},
		{"generic type", `{"mediaType":"` + m + `","config":` + cfg + `,"layers":[]}`, "application/json; charset=utf-8", true},
		{"docker", `{"mediaType":"` + dockerManifest + `","config":` + desc(dockerConfig) + `,"layers":[]}`, dockerManifest, true},
		{"index", `{"manifests":[` + desc(m) + `]}`, x, true},
		{"both", `{"config":` + cfg + `,"layers":[` + lay + `],"manifests":[` + desc(m) + `]}`, m, false},
		{"both, index", `{"layers":[],"manifests":[` + desc(m) + `]}`, x, false},
		{"type differs from header", `{"mediaType":"` + x + `","manifests":[]}`, m, false},
		{"index called manifest", `{"manifests":[]}`, m, false},
		{"no config", `{"layers":[` + lay + `]}`, m, false},
		{"artifact", `{"config":` + desc("application/vnd.example+json") + `,"layers":[]}`, m, false},
		{"artifact layer", `{"config":` + cfg + `,"layers":[` + desc("application/wasm") + `]}`, m, false},
		{"schema 1", `{"schemaVersion":1,"fsLayers":[]}`, "application/vnd.docker.distribution.manifest.v1+json", false},
		{"digest with path", strings.ReplaceAll(`{"config":`+cfg+`,"layers":[]}`, d, "sha256:../../x"), m, false},
		{"digest empty", strings.ReplaceAll(`{"config":`+cfg+`,"layers":[]}`, d, ""), m, false},
		{"digest upper case", strings.ReplaceAll(`{"manifests":[`+desc(m)+`]}`, d, strings.ToUpper(d)), x, false},
		{"negative size", `{"config":{"digest":"` + d + `","size":-1},"layers":[]}`, m, false},
		{"huge config", `{"config":{"digest":"` + d + `","size":9999999999},"layers":[]}`, m, false},
		{"null", `null`, m, false}, {"nothing", ``, m, false}, {"empty", `{}`, "", false},
	} {
		if _, err := parseDocument([]byte(tt.body), tt.ct); (err == nil) != tt.ok || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// images serves documents by digest, the first one also as tag v1.
func images(t *testing.T, docs ...any) (*recorder, []string) {
	bodies := map[string][]byte{}
	var order []string
	for _, d := range docs {
		b, ok := d.([]byte)
		if !ok {
			b, _ = json.Marshal(d)
		}
		dg := digest.FromBytes(b).String()
		bodies[dg] = b
		order = append(order, dg)
	}
	return serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		id := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		if id == "v1" {
			id = order[0]
		}
		b, ok := bodies[id]
		if !ok {
			w.WriteHeader(404)
			return
		}
		_, _ = w.Write(b)
	}), order
}

func describeDoc(mt string, v any, p *ocispec.Platform) ocispec.Descriptor {
	b, ok := v.([]byte)
	if !ok {
		b, _ = json.Marshal(v)
	}
	return ocispec.Descriptor{MediaType: mt, Digest: digest.FromBytes(b), Size: int64(len(b)), Platform: p}
}

func TestImageByPlatform(t *testing.T) {
	doc := func(arch string) (cfg []byte, m ocispec.Manifest) {
		cfg = []byte(`{"os":"linux","architecture":"` + arch + `","rootfs":{"type":"layers","diff_ids":[]}}`)
		m = ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: describeDoc(ocispec.MediaTypeImageConfig, cfg, nil), Layers: []ocispec.Descriptor{}}
		return cfg, m
	}
	c1, m1 := doc("arm64")
	c2, m2 := doc("amd64")
	attest := describeDoc(ocispec.MediaTypeImageManifest, m1, &ocispec.Platform{OS: "unknown", Architecture: "unknown"})
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		attest,
		describeDoc(ocispec.MediaTypeImageManifest, m1, &ocispec.Platform{OS: "linux", Architecture: "arm64"}),
		describeDoc(ocispec.MediaTypeImageManifest, m2, &amd64),
	}}
	srv, order := images(t, idx, m1, m2, c1, c2)
	r, n := repo(t, "", srv.host()+"/a/b:v1", nil)
	img, err := r.Image(t.Context(), n, amd64)
	if err != nil || img.Config.Architecture != "amd64" || img.Top.String() != order[0] || img.ID != m2.Config.Digest {
		t.Errorf("%+v, %v", img, err)
	}
	if _, err := r.Image(t.Context(), n, ocispec.Platform{OS: "linux", Architecture: "s390x"}); !errdefs.IsNotFound(err) {
		t.Errorf("no such platform: %v", err)
	}

	// An index of itself's kind, nested too deep, costs a bounded number of requests.
	var docs []any
	inner := any(idx)
	docs = append(docs, inner)
	for range 30 {
		d := describeDoc(ocispec.MediaTypeImageIndex, inner, &amd64)
		inner = ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d, d}}
		docs = append([]any{inner}, docs...)
	}
	srv, _ = images(t, docs...)
	r, n = repo(t, "", srv.host()+"/a/b:v1", nil)
	if _, err := r.Image(t.Context(), n, amd64); !errdefs.IsInvalidArgument(err) || len(srv.seen) > 12 {
		t.Errorf("deep index: %d requests, %v", len(srv.seen), err)
	}
}

func TestBoundedDocuments(t *testing.T) {
	srv := serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "denied") {
			w.WriteHeader(403)
		}
		chunk := make([]byte, 1<<20)
		for range 1024 {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	for tag, want := range map[string]func(error) bool{"v1": errdefs.IsInvalidArgument, "denied": errdefs.IsPermissionDenied} {
		r, n := repo(t, "", srv.host()+"/a/b:"+tag, nil)
		start := time.Now()
		if _, err := r.Image(t.Context(), n, amd64); !want(err) || time.Since(start) > 2*time.Second {
			t.Errorf("%s: %v after %v", tag, err, time.Since(start))
		}
	}
}

func TestChallenges(t *testing.T) {
	for in, want := range map[string][]challenge{
		`Bearer realm="https://x/t?a=b,c",service="s"`: {{"bearer", map[string]string{"realm": "https://x/t?a=b,c", "service": "s"}}},
		`Basic realm="a \"b\"", Bearer realm=x`:        {{"basic", map[string]string{"realm": `a "b"`}}, {"bearer", map[string]string{"realm": "x"}}},
		`Negotiate`:                                    {{"negotiate", map[string]string{}}},
		`Bearer realm="open`:                           {{"bearer", map[string]string{}}},
		`"`:                                            nil, ``: nil, `=`: nil,
	} {
		if got := parseChallenges([]string{in}); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v", in, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{"digest":"sha256:0"},"layers":[null],"manifests":null}`))
	f.Add([]byte("server = \"x\"\n[host.\"https://y\"]\nca=[\"a\"]\n"))
	f.Add([]byte(`Bearer realm="a", Basic`))
	f.Add([]byte(`{"history":[null],"rootfs":null,"config":{"Volumes":{"/":{}}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, ct := range []string{"", ocispec.MediaTypeImageManifest, dockerIndex} {
			if d, err := parseDocument(b, ct); err == nil && d.isIndex() {
				_, _ = choose(d.Manifests, amd64)
			}
		}
		_, _ = ParseConfig(b)
		_, _ = parseHosts(b, "/dir", "example.com")
		_ = parseChallenges([]string{string(b)})
	})
}
