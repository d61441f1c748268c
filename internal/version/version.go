// Package version holds the version that the binaries report.
package version

// Name is Berth's runtime name. It becomes the scheme of container ids
// ("berth://<id>") in the Kubernetes API and never changes.
const Name = "berth"

// Version is a semantic version without a leading "v". Release builds set it
// with -ldflags "-X github.com/berth-runtime/berth/internal/version.Version=...".
var Version = "0.1.0"

// Commit is the source revision of the build, or "" when it was not set.
var Commit string

// String is the version for people, with the commit when it is known.
func String() string {
	if Commit == "" {
		return Version
	}
	return Version + " (" + Commit + ")"
}
