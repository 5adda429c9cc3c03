package kube

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// apiServer is a connection to the API of a cluster.
type apiServer struct {
	base      *url.URL
	namespace string // the only one to be asked for; "" is all
	http      *http.Client
	token     func(context.Context) (string, error) // "" is none
}

// maxAPIAnswer bounds one answer and one event of the API in bytes.
const maxAPIAnswer = 32 << 20

// get asks for secrets; the answer is one of 200.
func (s *apiServer) get(ctx context.Context, values url.Values) (io.ReadCloser, error) {
	u := s.base.JoinPath("api/v1/secrets")
	if s.namespace != "" {
		u = s.base.JoinPath("api/v1/namespaces", s.namespace, "secrets")
	}
	u.RawQuery = values.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	token, err := s.token(ctx)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "tatami")
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	_ = resp.Body.Close() // the status says it
	if resp.StatusCode == http.StatusGone {
		return nil, errGone
	}
	return nil, statusError{resp.StatusCode, s.namespace}
}

func (s *apiServer) close() { s.http.CloseIdleConnections() }

// statusError is an answer of the API that is not 200.
type statusError struct {
	code      int
	namespace string
}

func (e statusError) Error() string {
	what := fmt.Sprintf("the API server answers %d %s", e.code, http.StatusText(e.code))
	switch {
	case e.code == http.StatusForbidden && e.namespace == "":
		return what + ": let its user list and watch secrets (a ClusterRole), or name one namespace in the context"
	case e.code == http.StatusForbidden:
		return what + ": let its user list and watch secrets in namespace " + e.namespace
	case e.code == http.StatusUnauthorized:
		return what + ": its token or certificate is not taken"
	}
	return what
}
