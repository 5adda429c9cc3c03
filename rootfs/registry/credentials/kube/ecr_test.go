package kube_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// ecrHost is a registry of Amazon's as their helper knows it, ecrAPI where it gets tokens.
const (
	ecrHost = "123456789012.dkr.ecr.us-east-1.amazonaws.com"
	ecrAPI  = "api.ecr.us-east-1.amazonaws.com"
)

// amazon answers GetAuthorizationToken (Amazon ECR API reference) on every connection
// that a proxy is asked for, with a certificate of its own.
type amazon struct {
	asked atomic.Int64
	api   *httptest.Server
	proxy *httptest.Server
	ca    []byte
}

func startAmazon(t *testing.T, password string) *amazon {
	t.Helper()
	a := &amazon{}
	pair, ca := certificate(t, ecrAPI)
	a.ca = ca
	a.api = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != ecrAPI || !strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".GetAuthorizationToken") || !strings.Contains(r.Header.Get("Authorization"), "AKIDTESTS") {
			http.Error(w, "what", http.StatusBadRequest)
			return
		}
		a.asked.Add(1)
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		fmt.Fprintf(w, `{"authorizationData": [{"authorizationToken": %q, "expiresAt": %d, "proxyEndpoint": "https://%s"}]}`,
			base64.StdEncoding.EncodeToString([]byte("AWS:"+password)), time.Now().Add(12*time.Hour).Unix(), ecrHost)
	}))
	a.api.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	a.api.StartTLS()
	t.Cleanup(a.api.Close)
	a.proxy = httptest.NewServer(http.HandlerFunc(a.connect))
	t.Cleanup(a.proxy.Close)
	return a
}

// connect is CONNECT (RFC 9110, 9.3.6) to the API, whatever host is named.
func (a *amazon) connect(w http.ResponseWriter, r *http.Request) {
	out, err := net.Dial("tcp", a.api.Listener.Addr().String())
	if err != nil || r.Method != http.MethodConnect {
		http.Error(w, "no", http.StatusBadGateway)
		return
	}
	in, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = out.Close() // the client sees that it is over
		return
	}
	fmt.Fprint(in, "HTTP/1.1 200 OK\r\n\r\n")
	go func() { defer out.Close(); _, _ = io.Copy(out, in) }() // ends with either
	go func() { defer in.Close(); _, _ = io.Copy(in, out) }()
}

// certificate makes one for a name, which is its own authority.
func certificate(t *testing.T, name string) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// TestECRHelper pulls from a registry of Amazon's name with their own helper.
func TestECRHelper(t *testing.T) {
	if _, err := exec.LookPath("docker-credential-ecr-login"); err != nil {
		t.Skip("needs docker-credential-ecr-login (Debian: amazon-ecr-credential-helper): `make setup` installs it")
	}
	const password = "canary-ecr"
	a := startAmazon(t, password)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ca.pem"), string(a.ca))
	for key, value := range map[string]string{
		"HOME": dir, "AWS_CA_BUNDLE": filepath.Join(dir, "ca.pem"), "HTTPS_PROXY": a.proxy.URL, "AWS_ECR_DISABLE_CACHE": "true",
		"AWS_ACCESS_KEY_ID": "AKIDTESTS", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
	} {
		t.Setenv(key, value)
	}
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "AWS", Password: password, Basic: true}})
	reg.PushImage("team/app", "v1", registrytest.Image{})
	config := filepath.Join(dir, "config.json")
	write(t, config, `{"credHelpers": {"`+ecrHost+`": "ecr-login"}}`)
	c := registry.New(registry.Config{
		PlainHTTP: func(string) bool { return true }, Credentials: credentials.Chain(discard, open(t, "", config)...),
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, reg.Host())
		},
	})
	t.Cleanup(func() { _ = c.Close() }) // never fails
	for range 3 {
		if _, err := c.Repository(parse(t, ecrHost+"/team/app")).Resolve(t.Context(), "v1"); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.asked.Load(); n != 1 {
		t.Errorf("Amazon was asked for %d tokens, one does", n)
	}
}
