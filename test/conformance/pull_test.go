package conformance

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/testimage"
)

// push makes an image with content of its own in repo and returns its reference.
func push(t *testing.T, repo string, c testimage.Compression) string {
	t.Helper()
	layer, err := testimage.Layer(c, testimage.Entry{Name: "unique", Body: []byte(repo)})
	if err != nil {
		t.Fatal(err)
	}
	cf, err := images.image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	base, err := images.image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	img, err := testimage.Image("", cf.Config, append(base, layer)...)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := images.Push(context.Background(), repo+":1", img)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := node.Images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
			t.Error(err)
		}
	})
	return ref
}

func pull(t *testing.T, ref string, auth *cri.AuthConfig) (string, error) {
	t.Helper()
	r, err := node.Images.PullImage(ctx(t), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: auth})
	return r.GetImageRef(), err
}

func imageStatus(t *testing.T, ref string) *cri.Image {
	t.Helper()
	r, err := node.Images.ImageStatus(ctx(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}
	return r.Image
}

func TestPullInEveryCompression(t *testing.T) {
	for _, c := range []testimage.Compression{testimage.Gzip, testimage.Zstd, testimage.Uncompressed} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			repo := "compression-" + strings.ToLower(fmt.Sprint("x", c))
			ref := push(t, repo, c)
			id, err := pull(t, ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			img := imageStatus(t, ref)
			if img == nil || img.Id != id || len(img.RepoTags) != 1 || img.RepoTags[0] != ref || len(img.RepoDigests) != 1 || img.Size == 0 {
				t.Fatalf("image = %v, id %s", img, id)
			}
			p := runPod(t, nil)
			ctr := started(t, p, func(c *cri.ContainerConfig) { c.Image.Image = id })
			if out, _, _ := execSync(t, ctr, "/bin/cat", "/unique"); out != repo {
				t.Errorf("content %q", out)
			}
			byDigest := img.RepoDigests[0]
			if again, err := pull(t, byDigest, nil); err != nil || again != id {
				t.Errorf("pull by digest: %s, %v", again, err)
			}
		})
	}
}

func TestPullOfAMissingImage(t *testing.T) {
	ref := images.Ref("no/such/repository:1")
	_, err := pull(t, ref, nil)
	wantCode(t, err, codes.NotFound, ref)
}

func TestPullWithCredentials(t *testing.T) {
	ref := push(t, "private", testimage.Gzip)
	defer images.fault("private", func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if u, p, ok := q.BasicAuth(); !ok || u != "user" || p != "pa:ss" {
			w.Header().Set("WWW-Authenticate", `Basic realm="berth test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, q)
	})()
	_, err := pull(t, ref, nil)
	if err == nil || status.Code(err) == codes.NotFound {
		t.Fatalf("anonymous: %v", err)
	}
	_, err = pull(t, ref, &cri.AuthConfig{Username: "user", Password: "wrong-secret"})
	if err == nil || strings.Contains(err.Error(), "wrong-secret") {
		t.Fatalf("wrong password: %v", err)
	}
	if imageStatus(t, ref) != nil {
		t.Fatal("a refused pull left an image")
	}
	if _, err := pull(t, ref, &cri.AuthConfig{Username: "user", Password: "pa:ss"}); err != nil {
		t.Fatal(err)
	}
	// the kubelet uses a pull of a present image as a check of credentials
	if _, err := pull(t, ref, &cri.AuthConfig{Username: "user", Password: "wrong"}); err == nil {
		t.Fatal("a present image was granted to wrong credentials")
	}
}

func TestPullWithABearerToken(t *testing.T) {
	ref := push(t, "bearer", testimage.Gzip)
	var issued atomic.Int32
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if u, p, _ := q.BasicAuth(); u != "user" || p != "secret" || !strings.Contains(q.URL.Query().Get("scope"), "repository:bearer:pull") {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		issued.Add(1)
		fmt.Fprint(w, `{"token":"let-me-in","expires_in":300}`)
	}))
	defer tokens.Close()
	defer images.fault("bearer", func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if q.Header.Get("Authorization") != "Bearer let-me-in" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="berth",scope="repository:bearer:pull"`, tokens.URL))
			http.Error(w, "", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, q)
	})()
	if _, err := pull(t, ref, &cri.AuthConfig{Username: "user", Password: "secret"}); err != nil {
		t.Fatal(err)
	}
	if issued.Load() == 0 {
		t.Fatal("no token was asked for")
	}
}

// blobs applies a fault to blobs only; the first n requests get it.
func blobs(n int32, f http.HandlerFunc) func(http.ResponseWriter, *http.Request, http.Handler) {
	var seen atomic.Int32
	return func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if strings.Contains(q.URL.Path, "/blobs/") && q.Method == http.MethodGet && seen.Add(1) <= n {
			f(w, q)
			return
		}
		next.ServeHTTP(w, q)
	}
}

func TestPullFaults(t *testing.T) {
	serverError := func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "boom", http.StatusInternalServerError) }
	wrongBytes := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat("not the blob ", 100)) }
	truncated := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100000")
		_, _ = w.Write([]byte("only this"))
	}
	for name, row := range map[string]struct {
		fault func(http.ResponseWriter, *http.Request, http.Handler)
		ok    bool
	}{
		"500 twice then well": {blobs(2, serverError), true},
		"500 for ever":        {blobs(1<<30, serverError), false},
		"wrong digest":        {blobs(1<<30, wrongBytes), false},
		"truncated for ever":  {blobs(1<<30, truncated), false},
	} {
		t.Run(name, func(t *testing.T) {
			repo := "fault-" + strings.ReplaceAll(name, " ", "-")
			ref := push(t, repo, testimage.Gzip)
			heal := images.fault(repo, row.fault)
			defer heal()
			_, err := pull(t, ref, nil)
			if (err == nil) != row.ok {
				t.Fatalf("err = %v", err)
			}
			if got := imageStatus(t, ref) != nil; got != row.ok {
				t.Fatalf("image visible: %v", got)
			}
			if row.ok {
				return
			}
			heal()
			if _, err := pull(t, ref, nil); err != nil {
				t.Fatalf("pull after the fault is gone: %v", err)
			}
		})
	}
}

func TestAHangingPullEndsAtTheDeadlineAndCanBeRetried(t *testing.T) {
	ref := push(t, "hang", testimage.Gzip)
	release := make(chan struct{})
	heal := images.fault("hang", blobs(1<<30, func(w http.ResponseWriter, q *http.Request) {
		select {
		case <-release:
		case <-q.Context().Done():
		}
	}))
	defer heal()
	defer close(release)
	short, cancel := shortContext(t, 700*time.Millisecond)
	defer cancel()
	_, err := node.Images.PullImage(short, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	wantCode(t, err, codes.DeadlineExceeded, "")
	heal()
	if _, err := pull(t, ref, nil); err != nil {
		t.Fatalf("retry: %v", err)
	}
}

func TestConcurrentPullsFetchEachBlobOnce(t *testing.T) {
	ref := push(t, "once", testimage.Gzip)
	var gets sync.Map
	defer images.fault("once", func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if strings.Contains(q.URL.Path, "/blobs/") && q.Method == http.MethodGet {
			n, _ := gets.LoadOrStore(q.URL.Path, new(atomic.Int32))
			n.(*atomic.Int32).Add(1)
		}
		next.ServeHTTP(w, q)
	})()
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, err := pull(t, ref, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	gets.Range(func(k, v any) bool {
		if n := v.(*atomic.Int32).Load(); n != 1 {
			t.Errorf("%s fetched %d times", k, n)
		}
		return true
	})
}

func TestImageFsInfo(t *testing.T) {
	r, err := node.Images.ImageFsInfo(ctx(t), &cri.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.ImageFilesystems) != 1 || len(r.ContainerFilesystems) != 1 || r.ImageFilesystems[0].UsedBytes.GetValue() == 0 || r.ImageFilesystems[0].Timestamp == 0 {
		t.Fatalf("image fs = %v", r)
	}
}

func TestRemoveImageRemovesAllItsNames(t *testing.T) {
	ref := push(t, "names", testimage.Gzip)
	id, err := pull(t, ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	if imageStatus(t, id) != nil || imageStatus(t, ref) != nil {
		t.Fatal("a removed image is still there")
	}
	l, err := node.Images.ListImages(ctx(t), &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: ref}}})
	if err != nil || len(l.Images) != 0 {
		t.Fatalf("list = %v, %v", l, err)
	}
}
