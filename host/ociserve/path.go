package ociserve

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
)

// The path elements that name a kind of object.
const (
	Manifests = "manifests"
	Blobs     = "blobs"
	Segments  = "segments"
	Referrers = "referrers"
)

// maxPath bounds a request's path in bytes: a repository name has at most 255,
// a digest or tag at most 128.
const maxPath = 1024

// Check refuses every request that a read-only registry does not take. done says
// that it has answered, to /v2/ itself.
func Check(w http.ResponseWriter, req *http.Request) (done bool, err error) {
	if req.ContentLength != 0 {
		w.Header().Set("Connection", "close") // nobody reads that body
	}
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return false, &Failure{Status: http.StatusMethodNotAllowed, Code: "UNSUPPORTED", Message: "this registry is read-only"}
	}
	if req.ContentLength != 0 {
		return false, &Failure{Status: http.StatusBadRequest, Code: "UNSUPPORTED", Message: "a request has no body here"}
	}
	if req.URL.Path != "/v2/" && req.URL.Path != "/v2" {
		return false, nil
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write([]byte("{}"))
	return true, Broken(err)
}

// Split takes /v2/<name>/<kind>/<ref> apart, for one of these kinds. A name may
// contain slashes.
func Split(path string, kinds ...string) (name, kind, ref string, err error) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if ok && len(path) <= maxPath {
		rest, ref = cutLast(rest)
		name, kind = cutLast(rest)
	}
	for _, k := range kinds {
		if kind == k && name != "" && ref != "" {
			return name, kind, ref, nil
		}
	}
	return "", "", "", &Failure{Status: http.StatusNotFound, Code: "UNSUPPORTED",
		Message: fmt.Sprintf("no such path here: ask for /v2/<name>/{%s}/<digest>", strings.Join(kinds, ","))}
}

// cutLast cuts s at its last slash; without one it is all in front of it.
func cutLast(s string) (before, after string) {
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		return s[:i], s[i+1:]
	}
	return s, ""
}

// ParseDigest is for references that cannot be tags.
func ParseDigest(ref string) (digest.Digest, error) {
	d, err := digest.Parse(ref)
	if err != nil {
		return "", &Failure{Status: http.StatusBadRequest, Code: "DIGEST_INVALID", Message: fmt.Sprintf("%q is not a digest", ref)}
	}
	return d, nil
}

// Missing says that an object is not there, or not for this client; who explains.
func Missing(kind, ref, who string) error {
	code := "BLOB_UNKNOWN"
	if kind == Manifests || kind == Referrers {
		code = "MANIFEST_UNKNOWN"
	}
	return &Failure{Status: http.StatusNotFound, Code: code, Message: kind + "/" + ref + " " + who}
}
