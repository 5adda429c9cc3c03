package faults

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Names that docker-registry and its token service agree on.
const (
	issuer  = "tests"
	service = "registry.test"
)

// leeway is for how long docker-registry takes a token that has ended
// (distribution 2.8, registry/auth/token/token.go, Leeway).
const leeway = time.Minute

// tokens is a token service as the distribution specification describes it: JWTs
// that the authority signs.
type tokens struct {
	by    *authority
	life  time.Duration // as the registry sees it
	given atomic.Int64
}

// startTokens returns the service and its "host:port".
func startTokens(t *testing.T, by *authority, life time.Duration) (*tokens, string) {
	t.Helper()
	s := &tokens{by: by, life: life}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return s, server.Listener.Addr().String()
}

// ServeHTTP answers GET /token?service=…&scope=repository:<name>:<action>,….
func (s *tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if u, p, ok := r.BasicAuth(); !ok || u != user || p != password || r.FormValue("service") != service {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong user or password"}]}`, http.StatusUnauthorized)
		return
	}
	s.given.Add(1)
	token, err := s.sign(r.Form["scope"])
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]string{"token": token}) // the client sees a lost answer
}

// sign makes a JWT (RFC 7519) for the scopes.
func (s *tokens) sign(scopes []string) (string, error) {
	type grant struct {
		Type    string   `json:"type"`
		Name    string   `json:"name"`
		Actions []string `json:"actions"`
	}
	var access []grant
	for _, scope := range scopes {
		if p := strings.Split(scope, ":"); len(p) == 3 {
			access = append(access, grant{p[0], p[1], strings.Split(p[2], ",")})
		}
	}
	now := time.Now()
	head, err := encoded(map[string]any{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(s.by.cert.Raw)}})
	if err != nil {
		return "", err
	}
	claims, err := encoded(map[string]any{
		"iss": issuer, "sub": user, "aud": service, "access": access, "jti": now.String(),
		"iat": now.Unix(), "nbf": now.Add(-time.Hour).Unix(), "exp": now.Add(s.life - leeway).Unix(),
	})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(head + "." + claims))
	r, v, err := ecdsa.Sign(rand.Reader, s.by.key, sum[:])
	if err != nil {
		return "", err
	}
	signature := make([]byte, 64) // RFC 7518, 3.4
	r.FillBytes(signature[:32])
	v.FillBytes(signature[32:])
	return head + "." + claims + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

func encoded(v any) (string, error) {
	b, err := json.Marshal(v)
	return base64.RawURLEncoding.EncodeToString(b), err
}
