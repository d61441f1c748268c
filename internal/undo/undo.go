// Package undo keeps the ways back of a half-done operation as a value.
package undo

import "errors"

// Stack collects undo functions. The zero value is ready to use.
type Stack struct{ fns []func() error }

// Push adds f; Run calls the newest first.
func (s *Stack) Push(f func() error) { s.fns = append(s.fns, f) }

// Release forgets everything: the operation is complete.
func (s *Stack) Release() { s.fns = nil }

// Run undoes everything that was not released and joins the errors; one
// failure does not stop the rest.
func (s *Stack) Run() error {
	var errs []error
	for i := len(s.fns) - 1; i >= 0; i-- {
		errs = append(errs, s.fns[i]())
	}
	s.fns = nil
	return errors.Join(errs...)
}
