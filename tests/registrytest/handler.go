package registrytest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// refuse answers with an OCI error body.
func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message) // the client sees a lost answer
}

func (s *Server) serveRegistry(w http.ResponseWriter, r *http.Request) {
	s.record(r, false)
	if r.URL.Path == "/token" {
		s.serveToken(w, r)
		return
	}
	name, kind, ref, ok := route(r.URL.Path)
	if !ok {
		refuse(w, http.StatusNotFound, "UNSUPPORTED", "no such route")
		return
	}
	if !s.authorized(w, r, name) {
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		s.serveWrite(w, r, name, kind, ref)
		return
	}
	switch kind {
	case "manifests":
		s.serveManifest(w, r, name, ref)
	case "referrers":
		s.serveReferrers(w, r, name, digest.Digest(ref))
	default:
		s.serveBlob(w, r, name, kind, digest.Digest(ref))
	}
}

// route splits "/v2/<name>/<kind>/<ref>".
func route(path string) (name, kind, ref string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	for _, kind := range []string{"manifests", "blobs", "referrers", "segments"} {
		if name, ref, found := strings.Cut(rest, "/"+kind+"/"); ok && found {
			return name, kind, ref, true
		}
	}
	return "", "", "", false
}

func (s *Server) serveManifest(w http.ResponseWriter, r *http.Request, name, ref string) {
	m, known := s.manifest(name, ref)
	if !known {
		s.reply(w, r, content{status: http.StatusNotFound, code: "NAME_UNKNOWN"})
		return
	}
	if m == nil {
		s.reply(w, r, content{status: http.StatusNotFound, code: "MANIFEST_UNKNOWN"})
		return
	}
	s.reply(w, r, content{mediaType: m.desc.MediaType, digest: m.desc.Digest, data: m.data, noRange: true})
}

func (s *Server) serveBlob(w http.ResponseWriter, r *http.Request, name, kind string, d digest.Digest) {
	data, known := s.blob(name, kind, d)
	if !known {
		s.reply(w, r, content{status: http.StatusNotFound, code: "BLOB_UNKNOWN"})
		return
	}
	if s.storage != nil && kind == "blobs" {
		http.Redirect(w, r, s.sign(name, d), http.StatusTemporaryRedirect)
		return
	}
	s.reply(w, r, content{mediaType: "application/octet-stream", digest: d, data: data, noRange: s.opts.NoRange})
}

// sign makes a URL of the redirect target.
func (s *Server) sign(name string, d digest.Digest) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	signature := strconv.Itoa(len(s.log)) + "-" + strconv.Itoa(len(s.signed))
	s.signed[signature] = expiry(s.opts.RedirectTTL)
	return fmt.Sprintf("%s/storage/%s/%s?signature=%s", s.storage.URL, name, d, signature)
}

// serveStorage is the redirect target.
func (s *Server) serveStorage(w http.ResponseWriter, r *http.Request) {
	s.record(r, true)
	if r.Header.Get("Authorization") != "" {
		refuse(w, http.StatusBadRequest, "InvalidArgument", "only one auth mechanism allowed")
		return
	}
	if !s.valid(s.signed, r.URL.Query().Get("signature")) {
		refuse(w, http.StatusForbidden, "AccessDenied", "request has expired")
		return
	}
	rest := strings.TrimPrefix(r.URL.Path, "/storage/")
	i := strings.LastIndexByte(rest, '/')
	d := digest.Digest(rest[i+1:])
	data, known := s.blob(rest[:max(i, 0)], "blobs", d)
	if !known {
		refuse(w, http.StatusNotFound, "NoSuchKey", "")
		return
	}
	s.reply(w, r, content{mediaType: "application/octet-stream", digest: d, data: data, noRange: s.opts.NoRange})
}

func (s *Server) serveReferrers(w http.ResponseWriter, r *http.Request, name string, subject digest.Digest) {
	if s.opts.NoReferrers {
		s.reply(w, r, content{status: http.StatusNotFound, code: "UNSUPPORTED"})
		return
	}
	list := s.referrers(name, subject)
	if size := s.opts.PageSize; size > 0 {
		first, _ := strconv.Atoi(r.URL.Query().Get("last")) // absent is the start
		first = min(max(first, 0), len(list))
		next := min(first+size, len(list))
		if next < len(list) {
			q := r.URL.Query()
			q.Set("last", strconv.Itoa(next))
			w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.Path, q.Encode()))
		}
		list = list[first:next]
	}
	data, err := json.Marshal(newIndex(list))
	if err != nil {
		refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
		return
	}
	s.reply(w, r, content{mediaType: ocispec.MediaTypeImageIndex, data: data, noRange: true})
}
