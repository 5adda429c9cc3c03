// Package conformance runs the conformance test of the OCI distribution
// specification, its read-only part, against the registries of tatami-host.
package conformance

import (
	"context"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/blobs"
	"github.com/tatami-containers/tatami/host/mirror"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/host/relay"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// program is the specification's own test.
const program = "github.com/opencontainers/distribution-spec/conformance@v0.0.0-20260831232431-97274622c111"

// content is what a registry has, for the test to ask for.
type content struct {
	repo, tag        string
	manifests, blobs []digest.Digest
	subject          digest.Digest
}

// server is a registry under test.
type server interface {
	Serve(l net.Listener) error
	Shutdown(ctx context.Context)
}

func serve(t *testing.T, s server) (addr string) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Shutdown(t.Context())
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// count matches one line of the program's summary.
var count = regexp.MustCompile(`(?m)^  (Pass|FAIL|Error|Skip|Unknown)\.+: +([0-9]+)$`)

// conform runs the program. What a registry of ours never has is off: pushing, deleting
// and lists of tags. That manifests have their digest in a header cannot be asked for:
// in read-only runs the program does not look at the answer that it wants it in
// (ManifestHeadExists). Its exit status does not count, as it crashes after its report
// then (ReportResultsYAML knows no data of an invalid digest).
func conform(t *testing.T, addr string, c content) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	results := t.TempDir()
	cmd := exec.CommandContext(ctx, "go", "run", program)
	cmd.Dir = results // outside of this module
	cmd.Env = append(os.Environ(), "GOFLAGS=", "CGO_ENABLED=0",
		"OCI_RESULTS_DIR="+results, "OCI_REGISTRY="+addr, "OCI_TLS=disabled", "OCI_REPO1="+c.repo, "OCI_REPO2="+c.repo,
		"OCI_API_PUSH=false", "OCI_API_BLOBS_DELETE=false", "OCI_API_MANIFESTS_DELETE=false", "OCI_API_TAGS_DELETE=false", "OCI_API_TAGS_LIST=false",
		"OCI_API_BLOBS_DIGEST_HEADER=true",
		"OCI_RO_DATA_TAGS="+c.tag, "OCI_RO_DATA_MANIFESTS="+join(c.manifests), "OCI_RO_DATA_BLOBS="+join(c.blobs),
		"OCI_RO_DATA_REFERRERS="+c.subject.String())
	out, err := cmd.CombinedOutput()
	got := map[string]string{}
	for _, m := range count.FindAllStringSubmatch(string(out), -1) {
		got[m[1]] = m[2]
	}
	if passed, _ := strconv.Atoi(got["Pass"]); passed < 14 || got["FAIL"] != "0" || got["Error"] != "0" {
		t.Errorf("%v, %v\n%s", got, err, out)
	}
}

func join(list []digest.Digest) string {
	var s []string
	for _, d := range list {
		s = append(s, d.String())
	}
	return strings.Join(s, " ")
}

// push makes an image with a referrer.
func push(t *testing.T, reg *registrytest.Server) content {
	t.Helper()
	layer := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("a", 0o644, strings.Repeat("x", 100<<10))))))
	img := reg.PushImage("conformance/app", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
	reg.PushReferrer("conformance/app", img.Desc, "application/vnd.test.sbom")
	return content{
		repo: "conformance/app", tag: "v1", manifests: []digest.Digest{img.Desc.Digest},
		blobs: []digest.Digest{img.Config.Digest, img.Layers[0].Digest}, subject: img.Desc.Digest,
	}
}

func TestMirror(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	c := push(t, reg)
	host := &registry.Host{Name: reg.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanAll}
	client := registry.New(registry.Config{Hosts: func(string) []*registry.Host { return []*registry.Host{host} }})
	cache, err := blobs.Open(blobs.Config{Dir: t.TempDir(), Size: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cache.Close(), client.Close() }) // never fail
	c.repo = "registry.test/" + c.repo
	conform(t, serve(t, mirror.New(mirror.Config{Registry: client, Blobs: cache})), c)
}

func TestRelay(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	c := push(t, reg)
	client := registry.New(registry.Config{})
	n, err := node.Open(node.Config{Root: t.TempDir(), Registry: client, Blobs: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		_ = client.Close() // never fails
	})
	ref, err := reference.ParseNormalizedNamed(reg.Host() + "/" + c.repo + ":" + c.tag)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Prepare(t.Context(), ref.String(), ""); err != nil {
		t.Fatal(err)
	}
	lease, err := n.Lease(t.Context(), ref.String(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lease.Close)
	for _, d := range lease.Referrers() { // the index that the node has built
		c.manifests = append(c.manifests, d.Digest)
	}
	grant := relay.Grant{Domain: reg.Host(), Repository: c.repo, Tag: c.tag, Manifest: lease.Manifest(), Image: lease}
	conform(t, serve(t, relay.New(relay.Config{Grants: func() []relay.Grant { return []relay.Grant{grant} }})), c)
}
