package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/katavm/extension"
	"github.com/tatami-containers/tatami/tests/katavm/kata"
)

// agent is the sandbox of the agent.
type agent struct {
	log       *slog.Logger
	extension *extension.Extension        // "coco"; nil without
	cdh       cdh.ImagePullServiceService // nil when no socket was found

	mu         sync.Mutex
	containers map[string]*container // protected by mu
	storages   map[string]bool       // what the agent unmounts when a container goes; protected by mu
}

// listen serves the agent's port.
func (a *agent) listen(ctx context.Context) error {
	l, err := vsock.Listen(fmt.Sprintf("vsock:%d", kata.AgentPort))
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	handle(mux, kata.PathCreate, a.create)
	handle(mux, kata.PathStart, a.start)
	handle(mux, kata.PathWait, a.wait)
	handle(mux, kata.PathRemove, a.remove)
	handle(mux, kata.PathShell, a.shell)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	a.log.Info("agent serves", "cdh", a.cdh != nil)
	return srv.Serve(l)
}

// handle serves one call. An error is answered as 500 with its text.
func handle[In, Out any](mux *http.ServeMux, path string, call func(context.Context, In) (Out, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		var in In
		err := json.NewDecoder(r.Body).Decode(&in)
		var out Out
		if err == nil {
			out, err = call(r.Context(), in)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(out) // the peer may be gone
	})
}

// none is an empty answer.
type none struct{}

func (a *agent) find(id string) (*container, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.containers[id]; c != nil {
		return c, nil
	}
	return nil, errors.New("invalid container id " + id)
}
