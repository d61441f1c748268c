package convert

import (
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/imageservice"
)

// Image is an image as CRI shows it.
func Image(i *imageservice.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id:          i.ID.String(),
		RepoTags:    i.Tags,
		RepoDigests: i.Digests,
		Size:        uint64(max(i.Size, 1)), // the kubelet rejects an image of size 0
		Pinned:      i.Pinned,
	}
	out.Uid, out.Username = imageUser(i.Config.Config.User)
	return out
}

// imageUser splits USER of an image config: the user part alone, as a uid when
// it is a number. Neither set means root, which runAsNonRoot then rejects.
func imageUser(user string) (*runtimeapi.Int64Value, string) {
	user, _, _ = strings.Cut(user, ":")
	if user == "" {
		return nil, ""
	}
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		return &runtimeapi.Int64Value{Value: uid}, ""
	}
	return nil, user
}

// Auth reads registry credentials; nil and an empty message are anonymous.
func Auth(a *runtimeapi.AuthConfig) *imageservice.Auth {
	if a == nil || (a.Username == "" && a.Password == "" && a.Auth == "" && a.IdentityToken == "" && a.RegistryToken == "") {
		return nil
	}
	return &imageservice.Auth{
		Username:      a.Username,
		Password:      a.Password,
		Auth:          a.Auth,
		IdentityToken: a.IdentityToken,
		RegistryToken: a.RegistryToken,
		Server:        a.ServerAddress,
	}
}

// FsUsage is the use of a filesystem as CRI shows it.
func FsUsage(u imageservice.FsUsage) *runtimeapi.FilesystemUsage {
	return &runtimeapi.FilesystemUsage{
		Timestamp:  nano(u.At),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: u.Mountpoint},
		UsedBytes:  &runtimeapi.UInt64Value{Value: u.Bytes},
		InodesUsed: &runtimeapi.UInt64Value{Value: u.Inodes},
	}
}
