package registrytest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// repo is one repository.
type repo struct {
	blobs     map[string][]byte // by kind and digest
	manifests map[digest.Digest]*manifest
	tags      map[string]digest.Digest
	referrers map[digest.Digest][]ocispec.Descriptor // by subject
}

type manifest struct {
	desc ocispec.Descriptor
	data []byte
}

// repo returns the repository, made when absent. Precondition: s.mu is held.
func (s *Server) repo(name string) *repo {
	r := s.repos[name]
	if r == nil {
		r = &repo{
			blobs:     map[string][]byte{},
			manifests: map[digest.Digest]*manifest{},
			tags:      map[string]digest.Digest{},
			referrers: map[digest.Digest][]ocispec.Descriptor{},
		}
		s.repos[name] = r
	}
	return r
}

// PushBlob adds a blob; data must not change any more.
func (s *Server) PushBlob(name, mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	s.PushBlobAs(name, d, data)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// PushBlobAs adds a blob under any digest, also a wrong one.
func (s *Server) PushBlobAs(name string, d digest.Digest, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.repo(name).blobs["blobs "+d.String()] = data
}

// PushSegment adds the plain bytes of a segment, which only a relay has.
func (s *Server) PushSegment(name string, id digest.Digest, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.repo(name).blobs["segments "+id.String()] = data
}

// PushManifest adds a manifest or index of any content and tags it, unless tag
// is "". One with a subject becomes a referrer of it.
func (s *Server) PushManifest(name, tag, mediaType string, data []byte) ocispec.Descriptor {
	return s.pushManifest(name, tag, mediaType, data, true)
}

// PushUnlisted is PushManifest without a tag, for registries that list nothing
// that refers to an image.
func (s *Server) PushUnlisted(name, mediaType string, data []byte) ocispec.Descriptor {
	return s.pushManifest(name, "", mediaType, data, false)
}

func (s *Server) pushManifest(name, tag, mediaType string, data []byte, list bool) ocispec.Descriptor {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	var doc ocispec.Manifest
	_ = json.Unmarshal(data, &doc) // what is no JSON is served, too
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.repo(name)
	r.manifests[desc.Digest] = &manifest{desc: desc, data: data}
	if tag != "" {
		r.tags[tag] = desc.Digest
	}
	if doc.Subject != nil && list {
		listed := desc
		// The distribution specification has the config's type stand in.
		listed.ArtifactType, listed.Annotations = cmp.Or(doc.ArtifactType, doc.Config.MediaType), doc.Annotations
		r.addReferrer(doc.Subject.Digest, listed)
	}
	return desc
}

// addReferrer lists desc for the API and under the tag that stands in for it.
func (r *repo) addReferrer(subject digest.Digest, desc ocispec.Descriptor) {
	if slices.ContainsFunc(r.referrers[subject], func(d ocispec.Descriptor) bool { return d.Digest == desc.Digest }) {
		return
	}
	r.referrers[subject] = append(r.referrers[subject], desc)
	data, err := json.Marshal(newIndex(r.referrers[subject]))
	if err != nil {
		panic(fmt.Sprintf("encode a list of referrers: %v", err)) // plain structs always encode
	}
	index := &manifest{
		desc: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(data), Size: int64(len(data))},
		data: data,
	}
	r.manifests[index.desc.Digest] = index
	r.tags[subject.Algorithm().String()+"-"+subject.Encoded()] = index.desc.Digest
}

func newIndex(list []ocispec.Descriptor) ocispec.Index {
	if list == nil {
		list = []ocispec.Descriptor{} // the specification wants an array
	}
	return ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: list}
}

// manifest looks up a tag or digest; known tells whether the repository exists.
func (s *Server) manifest(name, ref string) (m *manifest, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.repos[name]
	if r == nil {
		return nil, false
	}
	if d, ok := r.tags[ref]; ok {
		return r.manifests[d], true
	}
	return r.manifests[digest.Digest(ref)], true
}

func (s *Server) blob(name, kind string, d digest.Digest) (data []byte, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.repos[name]; r != nil {
		data, known = r.blobs[kind+" "+d.String()]
	}
	return data, known
}

func (s *Server) referrers(name string, subject digest.Digest) []ocispec.Descriptor {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.repos[name]; r != nil {
		return slices.Clone(r.referrers[subject])
	}
	return nil
}
