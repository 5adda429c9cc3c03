package relay

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/containerd/errdefs"
)

// failure is an answer with an error in it.
type failure struct {
	status        int
	code, message string // as the distribution specification has them
}

func (f *failure) Error() string { return f.message }

// errBroken says that the answer began and cannot be completed.
var errBroken = errors.New("answer broken off")

// broken marks an error that came after the answer's first byte.
func broken(err error) error {
	if err == nil {
		return nil
	}
	return errors.Join(errBroken, err)
}

// refuse answers with err, or breaks the connection where the answer has begun.
func (r *Relay) refuse(w http.ResponseWriter, req *http.Request, err error) {
	if errors.Is(err, context.Canceled) && req.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the guest has gone
	}
	if errors.Is(err, errBroken) {
		r.cfg.Log.Debug("answer broken off", "path", req.URL.Path, "error", err)
		panic(http.ErrAbortHandler)
	}
	var f *failure
	if !errors.As(err, &f) {
		f = classify(err)
		r.cfg.Log.Debug("request failed", "path", req.URL.Path, "error", err)
	}
	write(w, f)
}

// classify turns an error of the node into an answer. The guest is told the
// class, not the text: that may name hosts and paths of the node.
func classify(err error) *failure {
	switch {
	case errdefs.IsNotFound(err):
		return &failure{http.StatusNotFound, "BLOB_UNKNOWN", "the node has lost this object and its registry does not have it: prepare the image again"}
	case errdefs.IsDataLoss(err):
		return &failure{http.StatusBadGateway, "UNKNOWN", "what the registry sends does not have the right digest"}
	default:
		return &failure{http.StatusServiceUnavailable, "UNAVAILABLE", "the node cannot read this at the moment: try again or use another source"}
	}
}

func write(w http.ResponseWriter, f *failure) {
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, err := json.Marshal(map[string][]item{"errors": {{f.code, f.message}}})
	if err != nil {
		panic(http.ErrAbortHandler) // two strings always encode
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Del("Content-Length")
	w.WriteHeader(f.status)
	_, _ = w.Write(body) // the guest has gone; there is nobody to tell
}
