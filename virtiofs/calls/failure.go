package calls

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// failure is an error on the wire.
type failure struct {
	Class string `json:"class,omitempty"` // one of classes, or ""
	Text  string `json:"text"`
}

// classes are the names of errors on the wire.
var classes = map[string]error{
	"not found":           errdefs.ErrNotFound,
	"invalid argument":    errdefs.ErrInvalidArgument,
	"already exists":      errdefs.ErrAlreadyExists,
	"unavailable":         errdefs.ErrUnavailable,
	"permission denied":   errdefs.ErrPermissionDenied,
	"unimplemented":       errdefs.ErrNotImplemented,
	"resource exhausted":  errdefs.ErrResourceExhausted,
	"failed precondition": errdefs.ErrFailedPrecondition,
}

// maxText bounds the text of an error, in bytes.
const maxText = 4096

func fail(err error) *failure {
	if err == nil {
		return nil
	}
	f := &failure{Text: err.Error()}
	f.Text = f.Text[:min(len(f.Text), maxText)]
	for name, class := range classes {
		if errors.Is(err, class) {
			f.Class = name
		}
	}
	return f
}

// remote is an error of the other process.
type remote struct {
	text  string
	class error // may be nil
}

func (r *remote) Error() string { return r.text }
func (r *remote) Unwrap() error { return r.class }

func (f *failure) err() error {
	if f == nil {
		return nil
	}
	return fmt.Errorf("the other process: %w", &remote{f.Text, classes[f.Class]})
}
