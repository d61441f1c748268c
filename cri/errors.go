package cri

import (
	"context"
	"errors"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/berth-runtime/berth/internal/durable"
)

// kinds maps errdefs kinds to codes, the most specific first. NotFound is the
// one code that tells a kubelet that an object is gone for good, and
// Unimplemented the one that makes it use a fall-back: nothing else may become
// one of them.
var kinds = []struct {
	kind error
	code codes.Code
}{
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrUnauthenticated, codes.Unauthenticated},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrConflict, codes.FailedPrecondition},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrOutOfRange, codes.OutOfRange},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{errdefs.ErrDataLoss, codes.DataLoss},
	{errdefs.ErrInternal, codes.Internal},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// toStatus is the one place where an error becomes a gRPC code. What has no kind
// is Unknown, as gRPC itself would have it. An error that already is a status
// (from the streaming server) keeps its code.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	if err = durable.Explain(err); lacks(err) {
		return status.Error(codes.ResourceExhausted, text(err, errdefs.ErrResourceExhausted))
	}
	for _, k := range kinds {
		if errors.Is(err, k.kind) {
			return status.Error(k.code, text(err, k.kind))
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// lacks says whether the node ran out of something, whatever was asked for.
func lacks(err error) bool {
	for _, e := range []error{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Message is the text that a client gets for err.
func Message(err error) string { return status.Convert(toStatus(err)).Message() }

// text is the error's text without the kind at its end, which the code says
// already: kubelets put the text into events and conditions.
func text(err, kind error) string {
	msg := err.Error()
	for { // Explain may have added it to an error that had it
		s, ok := strings.CutSuffix(msg, ": "+kind.Error())
		if !ok || s == "" {
			return msg
		}
		msg = s
	}
}

// pullError gives pull errors the form that the kubelet understands: it unwraps
// the text only of code Unknown, and there recognises an unreachable registry
// by this prefix.
func pullError(err error) error {
	if err != nil && errdefs.IsUnavailable(err) {
		return status.Error(codes.Unknown, "RegistryUnavailable: "+text(err, errdefs.ErrUnavailable))
	}
	return err
}
