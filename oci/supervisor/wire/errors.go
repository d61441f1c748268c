package wire

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/durable"
)

// ErrUnknownProfile is the answer to a Create whose profile the supervisor does
// not have: send it (OpProfile) and try again.
var ErrUnknownProfile = fmt.Errorf("seccomp profile: %w", errdefs.ErrNotFound)

// kinds pairs the words of the protocol with the error kinds of the house. The
// first match is sent; a word that is not listed is read as internal.
var kinds = []struct {
	word string
	kind error
}{
	{"unknown-profile", ErrUnknownProfile},
	{"not-found", errdefs.ErrNotFound},
	{"invalid", errdefs.ErrInvalidArgument},
	{"exists", errdefs.ErrAlreadyExists},
	{"precondition", errdefs.ErrFailedPrecondition},
	{"denied", errdefs.ErrPermissionDenied},
	{"unimplemented", errdefs.ErrNotImplemented},
	{"unavailable", errdefs.ErrUnavailable},
	{"exhausted", errdefs.ErrResourceExhausted},
	{"internal", errdefs.ErrInternal},
}

// ToError puts err into the words of the protocol; nil for nil.
func ToError(err error) *Error {
	if err == nil {
		return nil
	}
	err = durable.Explain(err) // the other side has the text only
	for _, k := range kinds {
		if errors.Is(err, k.kind) {
			return &Error{Kind: k.word, Text: err.Error()}
		}
	}
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) {
		return &Error{Kind: "exhausted", Text: err.Error()}
	}
	return &Error{Kind: "internal", Text: err.Error()}
}

// Error is the text of the sender, unchanged.
func (e *Error) Error() string { return e.Text }

// Unwrap returns the errdefs kind.
func (e *Error) Unwrap() error {
	for _, k := range kinds {
		if k.word == e.Kind {
			return k.kind
		}
	}
	return errdefs.ErrInternal
}

// ErrBroken is the client's error of a request whose supervisor has gone before
// its answer came: it was done, or half of it, or not. Requests that can be done
// twice are repeated with the next supervisor; OpStart, OpExec and OpStdin are not.
var ErrBroken = fmt.Errorf("supervisor: connection lost before the answer: %w", errdefs.ErrUnavailable)
