package nvme

import (
	"errors"
	"fmt"
)

// RangeError says that a value cannot be expressed in its wire field.
type RangeError struct {
	What  string
	Value uint64
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("%s: %#x does not fit its field", e.What, e.Value)
}

// StatusError is a status that is not success, with what caused it on this side, if anything did.
type StatusError struct {
	Status Status
	Cause  error // nil: the status is all that is known
}

func (e *StatusError) Error() string {
	if e.Cause == nil {
		return e.Status.String()
	}
	return e.Status.String() + ": " + e.Cause.Error()
}

// Unwrap returns the cause.
func (e *StatusError) Unwrap() error { return e.Cause }

// Err returns nil for success and a *StatusError for anything else.
func (s Status) Err() error {
	if s.OK() {
		return nil
	}
	return &StatusError{Status: s}
}

// StatusOf returns the status that err carries: StatusSuccess for nil,
// StatusInternalError for an error that carries none.
func StatusOf(err error) Status {
	if err == nil {
		return StatusSuccess
	}
	if e, ok := errors.AsType[*StatusError](err); ok {
		return e.Status
	}
	return StatusInternalError
}
