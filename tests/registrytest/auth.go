package registrytest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Auth makes the registry ask for credentials.
type Auth struct {
	User, Password string        // "" gives tokens to everybody
	Basic          bool          // basic authentication instead of tokens
	TTL            time.Duration // of tokens; 0 is until ExpireTokens
	TellTTL        bool          // the token service says TTL, in seconds
	Delay          time.Duration // the token service takes this long
}

// ExpireTokens makes all tokens invalid.
func (s *Server) ExpireTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// SetPassword changes the password, as a rotation does; tokens stay valid.
func (s *Server) SetPassword(password string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := *s.opts.Auth
	a.Password = password
	s.opts.Auth = &a
}

// auth is what was set last; nil for a server that asks for nothing.
func (s *Server) auth() *Auth {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opts.Auth
}

// ExpireRedirects makes all redirect targets invalid.
func (s *Server) ExpireRedirects() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.signed)
}

// authorized checks a request and answers it with a challenge when it fails.
func (s *Server) authorized(w http.ResponseWriter, r *http.Request, name string) bool {
	a := s.auth()
	if a == nil {
		return true
	}
	if a.Basic {
		user, password, ok := r.BasicAuth()
		if ok && user == a.User && password == a.Password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
	} else {
		token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		needed := scope(name)
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			needed += pushScope
		}
		if s.valid(s.tokens, needed+" "+token) || s.valid(s.tokens, scope(name)+pushScope+" "+token) {
			return true
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="registrytest",scope="%s"`, s.main.URL, needed))
	}
	refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	return false
}

func scope(name string) string { return "repository:" + name + ":pull" }

// pushScope makes a scope to pull one to push as well.
const pushScope = ",push"

// valid looks up an expiry in one of the server's tables.
func (s *Server) valid(table map[string]time.Time, key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	until, ok := table[key]
	return ok && (until.IsZero() || time.Now().Before(until))
}

func expiry(ttl time.Duration) time.Time {
	if ttl == 0 {
		return time.Time{}
	}
	return time.Now().Add(ttl)
}

// serveToken is the token service.
func (s *Server) serveToken(w http.ResponseWriter, r *http.Request) {
	a := s.auth()
	user, password, _ := r.BasicAuth()
	if a == nil || user != a.User || password != a.Password {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "wrong user or password")
		return
	}
	s.wait(r, a.Delay)
	s.mu.Lock()
	s.fetched++
	token := "token-" + strconv.Itoa(s.fetched)
	for _, sc := range r.URL.Query()["scope"] {
		s.tokens[sc+" "+token] = expiry(a.TTL)
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	answer := map[string]any{"token": token}
	if a.TellTTL {
		answer["expires_in"] = int(a.TTL / time.Second)
	}
	_ = json.NewEncoder(w).Encode(answer) // the client sees a lost answer
}

// wait returns after d, or when the request or the server ends.
func (s *Server) wait(r *http.Request, d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-time.After(d):
	case <-r.Context().Done():
	case <-s.done:
	}
}
