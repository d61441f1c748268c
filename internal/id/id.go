// Package id holds the typed identifiers that cross package borders. An id is
// 64 lower-case hexadecimal digits: cAdvisor, the kubelet's log symlinks and
// cgroup-name parsers recognise that form.
package id

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"

	"github.com/containerd/errdefs"
)

// Pod identifies a pod sandbox.
type Pod string

// Container identifies a container.
type Container string

// Exec identifies one exec session inside a container.
type Exec string

// NewPod returns a fresh random pod sandbox id.
func NewPod() Pod { return Pod(random()) }

// NewContainer returns a fresh random container id.
func NewContainer() Container { return Container(random()) }

// NewExec returns a fresh random exec id.
func NewExec() Exec { return Exec(random()) }

// Valid reports whether s has the form of an id and is thus safe as one path element.
func Valid(s string) error {
	if len(s) != 64 {
		return fmt.Errorf("id %q: want 64 hexadecimal digits: %w", s, errdefs.ErrInvalidArgument)
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("id %q: want lower-case hexadecimal digits: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Short is the form shown to people: the first 13 digits, as crictl prints them.
func Short[T ~string](v T) string {
	if len(v) > 13 {
		return string(v[:13])
	}
	return string(v)
}

func random() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails since Go 1.24
	return hex.EncodeToString(b[:])
}
