package ociserve

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/containerd/errdefs"
)

// Failure is an answer with an error in it.
type Failure struct {
	Status        int
	Code, Message string      // as the distribution specification has them
	Header        http.Header // of the answer, beside its own; may be nil
}

func (f *Failure) Error() string { return f.Message }

// errBroken says that the answer began and cannot be completed.
var errBroken = errors.New("answer broken off")

// Broken marks an error that came after the answer's first byte.
func Broken(err error) error {
	if err == nil {
		return nil
	}
	return errors.Join(errBroken, err)
}

// refuse answers with err, or breaks the connection where the answer has begun.
func (s *Server) refuse(w http.ResponseWriter, req *http.Request, err error) {
	if errors.Is(err, context.Canceled) && req.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has gone
	}
	if errors.Is(err, errBroken) {
		s.complaints.log(s.cfg.Log, "answer broken off", req.URL.Path, err)
		panic(http.ErrAbortHandler)
	}
	var f *Failure
	if !errors.As(err, &f) {
		f = classify(err)
		s.complaints.log(s.cfg.Log, "request failed", req.URL.Path, err)
	}
	write(w, f)
}

// classify turns an error of the node into an answer. The client is told the
// class, not the text: that may name hosts and paths of the node.
func classify(err error) *Failure {
	switch {
	case errdefs.IsNotFound(err):
		return &Failure{Status: http.StatusNotFound, Code: "BLOB_UNKNOWN", Message: "the node has lost this object and its registry does not have it: prepare the image again"}
	case errdefs.IsDataLoss(err):
		return &Failure{Status: http.StatusBadGateway, Code: "UNKNOWN", Message: "what the registry sends does not have the right digest"}
	default:
		return &Failure{Status: http.StatusServiceUnavailable, Code: "UNAVAILABLE", Message: "the node cannot read this at the moment (its log says why): try again or use another source"}
	}
}

func write(w http.ResponseWriter, f *Failure) {
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, err := json.Marshal(map[string][]item{"errors": {{f.Code, f.Message}}})
	if err != nil {
		panic(http.ErrAbortHandler) // two strings always encode
	}
	h := w.Header()
	for key, values := range f.Header {
		h[key] = values
	}
	h.Set("Content-Type", "application/json")
	h.Del("Content-Length")
	w.WriteHeader(f.Status)
	_, _ = w.Write(body) // the client has gone; there is nobody to tell
}

// IsBroken tells whether err came after the answer's first byte.
func IsBroken(err error) bool { return errors.Is(err, errBroken) }
