// Package convert translates between the messages of CRI v1 and the engine's
// values. It is pure: it reads no file and keeps nothing. Requests are
// validated on the way in, and every error names the field and the remedy;
// answers are built on the way out in the shape that the kubelet depends on.
package convert

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// FieldError says which field of a request is wrong and what to do about it. It
// is of the kind errdefs.ErrInvalidArgument.
type FieldError struct {
	Field string // path from the request's root, in proto names
	Text  string
}

// Error is "field: text".
func (e *FieldError) Error() string { return e.Field + ": " + e.Text }

// Unwrap gives the kind.
func (e *FieldError) Unwrap() error { return errdefs.ErrInvalidArgument }

func invalid(field, format string, args ...any) error {
	return &FieldError{Field: field, Text: fmt.Sprintf(format, args...)}
}

// Required is the error for a field that must not be empty.
func Required(field string) error { return invalid(field, "missing; it is required") }
