package registrytest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// uploadType is the media type of bodies of uploads.
const uploadType = "application/octet-stream"

// serveWrite answers what pushes: upload sessions, cross-repository mounts and
// manifests, which must name nothing that is not there. Faults other than
// Status, Delay and Truncate (of the body that is received) do nothing here.
func (s *Server) serveWrite(w http.ResponseWriter, r *http.Request, name, kind, ref string) {
	e := s.effects(r)
	s.wait(r, e.delay)
	for header, value := range e.header {
		w.Header().Set(header, value)
	}
	if e.status != 0 {
		refuse(w, e.status, "INJECTED", "from registrytest")
		return
	}
	var body io.Reader = r.Body
	if e.truncate != nil {
		body = io.LimitReader(body, *e.truncate)
	}
	data, err := io.ReadAll(body)
	if err != nil || e.truncate != nil {
		panic(http.ErrAbortHandler) // closes the connection
	}
	id, isUpload := strings.CutPrefix(ref, "uploads/")
	switch {
	case kind == "manifests" && r.Method == http.MethodPut:
		s.putManifest(w, name, ref, r.Header.Get("Content-Type"), data)
	case kind == "blobs" && isUpload && r.Method == http.MethodPost && id == "":
		s.beginUpload(w, r, name)
	case kind == "blobs" && isUpload && (r.Method == http.MethodPatch || r.Method == http.MethodPut):
		s.goOn(w, r, name, id, data)
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method)
	}
}

func (s *Server) beginUpload(w http.ResponseWriter, r *http.Request, name string) {
	d := digest.Digest(r.URL.Query().Get("mount"))
	if from := r.URL.Query().Get("from"); from != "" {
		if data, known := s.blob(from, "blobs", d); known {
			s.PushBlobAs(name, d, data)
			w.WriteHeader(http.StatusCreated)
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions++
	id := strconv.Itoa(s.sessions)
	s.uploads[name+" "+id] = nil
	location(w, name, id)
	w.WriteHeader(http.StatusAccepted)
}

// location is relative, as the specification allows.
func location(w http.ResponseWriter, name, id string) {
	w.Header().Set("Location", fmt.Sprintf("/v2/%s/blobs/uploads/%s?state=secret", name, id))
}

func (s *Server) goOn(w http.ResponseWriter, r *http.Request, name, id string, data []byte) {
	if t := r.Header.Get("Content-Type"); t != uploadType {
		refuse(w, http.StatusBadRequest, "BLOB_UPLOAD_INVALID", "content type "+t)
		return
	}
	key := name + " " + id
	s.mu.Lock()
	before, known := s.uploads[key]
	data = append(bytes.Clone(before), data...)
	s.uploads[key] = data
	if !known || r.Method == http.MethodPut {
		delete(s.uploads, key)
	}
	s.mu.Unlock()
	if !known || r.URL.Query().Get("state") != "secret" {
		refuse(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "")
		return
	}
	if r.Method == http.MethodPatch {
		location(w, name, id)
		w.WriteHeader(http.StatusAccepted)
		return
	}
	d := digest.Digest(r.URL.Query().Get("digest"))
	if d.Validate() != nil || d.Algorithm().FromBytes(data) != d {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "")
		return
	}
	s.PushBlobAs(name, d, data)
	w.Header().Set("Docker-Content-Digest", d.String())
	w.WriteHeader(http.StatusCreated)
}

func (s *Server) putManifest(w http.ResponseWriter, name, ref, mediaType string, data []byte) {
	d, tag := digest.FromBytes(data), ref
	if want, err := digest.Parse(ref); err == nil {
		if want != d {
			refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "")
			return
		}
		tag = ""
	}
	var doc struct {
		ocispec.Manifest
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		refuse(w, http.StatusBadRequest, "MANIFEST_INVALID", err.Error())
		return
	}
	if missing := s.missing(name, doc.Manifest, doc.Manifests); missing != "" {
		refuse(w, http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", missing.String())
		return
	}
	s.pushManifest(name, tag, mediaType, data, !s.opts.NoReferrers)
	if doc.Subject != nil && !s.opts.NoReferrers {
		w.Header().Set("OCI-Subject", doc.Subject.Digest.String())
	}
	if !s.opts.NoDigest {
		w.Header().Set("Docker-Content-Digest", d.String())
	}
	w.WriteHeader(http.StatusCreated)
}

// missing returns the digest of something that a manifest or an index names
// and the repository does not have, or "".
func (s *Server) missing(name string, m ocispec.Manifest, children []ocispec.Descriptor) digest.Digest {
	for _, c := range children {
		if found, _ := s.manifest(name, c.Digest.String()); found == nil {
			return c.Digest
		}
	}
	if m.Config.Digest == "" {
		return ""
	}
	for _, b := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if _, known := s.blob(name, "blobs", b.Digest); !known && len(b.URLs) == 0 {
			return b.Digest
		}
	}
	return ""
}
