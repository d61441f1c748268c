// Package imageservice pulls, stores and names container images. It owns
// everything under <root>/images: blobs are never stored; each layer is
// unpacked in one pass into a directory of its own and becomes visible by one
// rename after it is durable; names are written last.
package imageservice

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is a locally complete image. Values are immutable and may be shared.
type Image struct {
	// ID is the digest of the image config: the one identity of an image.
	ID digest.Digest
	// Tags are the names with a tag ("docker.io/library/busybox:1.36") and Digests
	// those with a manifest digest ("docker.io/library/busybox@sha256:..."), sorted.
	Tags, Digests []string
	// Size is what the layers and the config take on disk, in bytes; never 0.
	Size int64
	// Layers are the unpacked layer directories from the top one to the bottom one.
	Layers []string
	// Config is the image config (runtime part, platform, history).
	Config ocispec.Image
	// Pinned images are skipped by the kubelet's garbage collection.
	Pinned bool
	// PulledAt is the time of the first complete pull.
	PulledAt time.Time
}

// Auth is what CRI's AuthConfig carries. It is bound to Server when that is
// set, and to the registry host of the reference otherwise.
type Auth struct {
	Username, Password string
	// Auth is base64("user:password"), possibly ending in NUL.
	Auth string
	// IdentityToken is an OAuth2 refresh token; RegistryToken a bearer token used as is.
	IdentityToken, RegistryToken string
	Server                       string
}

// PullRequest asks for one image. Ref is a familiar or full reference with tag
// or digest; no tag means "latest".
type PullRequest struct {
	Ref      string
	Auth     *Auth
	Progress func(Progress) // optional; must return quickly
}

// Progress reports the state of a pull. Total is 0 while unknown.
type Progress struct {
	Layer       digest.Digest // blob digest; empty for the image as a whole
	Done, Total int64         // compressed bytes
	Complete    bool
}

// FsUsage is the use of one filesystem by Berth.
type FsUsage struct {
	Mountpoint string // existing directory on that filesystem
	Bytes      uint64
	Inodes     uint64
	At         time.Time
}

// Config is what a Service needs to run.
type Config struct {
	// Root is the directory that the service owns, on a filesystem that can be an
	// overlay lower layer with trusted.* xattrs.
	Root string
	// RegistryConfigDir holds <host>/hosts.toml files in containerd's format.
	RegistryConfigDir string
	// Platform is "os/arch[/variant]"; empty means the running machine's.
	Platform string
}
