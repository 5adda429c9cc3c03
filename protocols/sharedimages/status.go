package sharedimages

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// Status is the class of an answer. 0 is success.
type Status uint16

// other stands for errors of no class, and for statuses of later versions.
const other Status = 255

// classes by Status; numbers are never used again.
var classes = map[Status]error{
	1: errdefs.ErrInvalidArgument, 2: errdefs.ErrNotFound, 3: errdefs.ErrPermissionDenied, 4: errdefs.ErrResourceExhausted,
	5: errdefs.ErrFailedPrecondition, 6: errdefs.ErrUnavailable, 7: errdefs.ErrDataLoss, 8: context.Canceled,
	9: errdefs.ErrNotImplemented,
}

// maxText bounds the text of an error on the wire, in bytes.
const maxText = 1024

// failure is an error for the wire.
func failure(err error) (Status, []byte) {
	text := err.Error()
	text = text[:min(len(text), maxText)]
	class := errdefs.Resolve(err)
	for status, c := range classes {
		if c == class { //nolint:errorlint // Resolve returns one of these values
			return status, []byte(text)
		}
	}
	return other, []byte(text)
}

// Fail makes h the answer of a failure; it returns the payload. err is not nil.
func (h *Header) Fail(err error) []byte {
	var text []byte
	h.Status, text = failure(err)
	return text
}

// Err is the error of an answer; nil for success.
func (h *Header) Err(payload []byte) error {
	if h.Status == 0 {
		return nil
	}
	text := fmt.Sprintf("%.*q", maxText, payload)
	if class := classes[h.Status]; class != nil {
		return &answer{text: "tatami-host: " + text[1:len(text)-1], class: class}
	}
	return errors.New("tatami-host: " + text[1:len(text)-1])
}

// answer is an error of the other side; its text has the class in it already.
type answer struct {
	text  string
	class error
}

func (a *answer) Error() string { return a.text }
func (a *answer) Unwrap() error { return a.class }
