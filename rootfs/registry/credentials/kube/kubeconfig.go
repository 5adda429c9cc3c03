package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

// kubeconfig is what we need of kubectl's file (kubernetes
// staging/src/k8s.io/client-go/tools/clientcmd/api/v1/types.go).
type kubeconfig struct {
	Kind           string `yaml:"kind"`
	CurrentContext string `yaml:"current-context"`
	Clusters       []struct {
		Name    string      `yaml:"name"`
		Cluster kubeCluster `yaml:"cluster"`
	} `yaml:"clusters"`
	Users []struct {
		Name string   `yaml:"name"`
		User kubeUser `yaml:"user"`
	} `yaml:"users"`
	Contexts []struct {
		Name    string      `yaml:"name"`
		Context kubeContext `yaml:"context"`
	} `yaml:"contexts"`
}

type kubeContext struct {
	Cluster   string `yaml:"cluster"`
	User      string `yaml:"user"`
	Namespace string `yaml:"namespace"`
}

type kubeCluster struct {
	Server     string `yaml:"server"`
	ServerName string `yaml:"tls-server-name"`
	Insecure   bool   `yaml:"insecure-skip-tls-verify"`
	CA         string `yaml:"certificate-authority"`
	CAData     string `yaml:"certificate-authority-data"` // base64, as all data here
	ProxyURL   string `yaml:"proxy-url"`
}

type kubeUser struct {
	Token     string         `yaml:"token"`
	TokenFile string         `yaml:"tokenFile"`
	Cert      string         `yaml:"client-certificate"`
	CertData  string         `yaml:"client-certificate-data"`
	Key       string         `yaml:"client-key"`
	KeyData   string         `yaml:"client-key-data"`
	Exec      *kubeExec      `yaml:"exec"`
	Provider  map[string]any `yaml:"auth-provider"`
}

type kubeExec struct {
	APIVersion string   `yaml:"apiVersion"`
	Command    string   `yaml:"command"`
	Args       []string `yaml:"args"`
	Env        []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	ClusterInfo bool `yaml:"provideClusterInfo"`
}

// parseKubeconfig returns nil for what is not a kubeconfig. Its errors quote nothing
// of it.
func parseKubeconfig(data []byte) (*kubeconfig, error) {
	var k kubeconfig
	err := yaml.Unmarshal(data, &k)
	if k.Kind != "Config" {
		return nil, nil
	}
	if err != nil {
		return nil, errors.New("it cannot be decoded; does kubectl take it?")
	}
	return &k, nil
}

// connect reads a kubeconfig and what it names.
func connect(ctx context.Context, path string) (*apiServer, error) {
	data, err := credentials.ReadFile(path)
	if err != nil {
		return nil, err
	}
	k, err := parseKubeconfig(data)
	if err == nil && k == nil {
		err = errors.New("it is no kubeconfig any more")
	}
	if err != nil {
		return nil, err
	}
	return k.connect(ctx, filepath.Dir(path))
}

// connect makes a connection of the current context. Files are relative to dir.
func (k *kubeconfig) connect(ctx context.Context, dir string) (*apiServer, error) {
	at, cluster, user, err := k.current()
	if err != nil {
		return nil, err
	}
	base, err := url.Parse(cluster.Server)
	if err != nil || base.Scheme != "https" || base.Host == "" {
		return nil, errors.New("server: give https://host:port; secrets do not travel without TLS")
	}
	conf, err := cluster.tls(dir)
	if err != nil {
		return nil, err
	}
	proxy := http.ProxyFromEnvironment
	if cluster.ProxyURL != "" {
		u, err := url.Parse(cluster.ProxyURL)
		if err != nil {
			return nil, errors.New("proxy-url: it is no URL")
		}
		proxy = http.ProxyURL(u)
	}
	s := &apiServer{base: base, namespace: at.Namespace}
	if s.token, err = user.authenticate(ctx, dir, conf); err != nil {
		return nil, err
	}
	s.http = &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: conf, Proxy: proxy, ForceAttemptHTTP2: true, TLSHandshakeTimeout: apiTimeout, IdleConnTimeout: apiTimeout,
			HTTP2: &http.HTTP2Config{SendPingTimeout: apiTimeout, PingTimeout: apiTimeout}, // a watch may say nothing for long
		},
		// A redirect would take the token along.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return s, nil
}

func (k *kubeconfig) current() (at kubeContext, cluster kubeCluster, user kubeUser, err error) {
	found := 0
	for _, c := range k.Contexts {
		if c.Name == k.CurrentContext {
			at = c.Context
			found++
			break
		}
	}
	for _, c := range k.Clusters {
		if found == 1 && c.Name == at.Cluster {
			cluster = c.Cluster
			found++
			break
		}
	}
	for _, u := range k.Users {
		if found == 2 && u.Name == at.User {
			user = u.User
			found++
			break
		}
	}
	if found != 3 {
		err = errors.New("current-context: it does not name a context with a cluster and a user")
	}
	return at, cluster, user, err
}

// dataOr returns decoded data, or else what the file holds; nil for neither.
func dataOr(dir, data, file, key string) ([]byte, error) {
	if data != "" {
		b, err := base64.StdEncoding.DecodeString(data)
		if err != nil {
			return nil, fmt.Errorf("%s-data: it is not base64", key)
		}
		return b, nil
	}
	if file == "" {
		return nil, nil
	}
	b, err := credentials.ReadFile(under(dir, file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s %s: %w", key, file, err)
	}
	return b, err
}

func under(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

func (c kubeCluster) tls(dir string) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName, InsecureSkipVerify: c.Insecure} //nolint:gosec // as the user says
	ca, err := dataOr(dir, c.CAData, c.CA, "certificate-authority")
	if err != nil || ca == nil {
		return conf, err
	}
	conf.RootCAs = x509.NewCertPool()
	if !conf.RootCAs.AppendCertsFromPEM(ca) {
		return nil, errors.New("certificate-authority: there is no certificate in it")
	}
	return conf, nil
}

// authenticate puts a certificate into conf and returns where tokens come from.
func (u kubeUser) authenticate(ctx context.Context, dir string, conf *tls.Config) (func(context.Context) (string, error), error) {
	if u.Provider != nil {
		return nil, errors.New("auth-provider: Kubernetes has no such any more; use exec, a token or a certificate")
	}
	cert, err := dataOr(dir, u.CertData, u.Cert, "client-certificate")
	if err != nil {
		return nil, err
	}
	key, err := dataOr(dir, u.KeyData, u.Key, "client-key")
	if err != nil {
		return nil, err
	}
	if u.Exec != nil {
		e := &execToken{exec: *u.Exec, dir: dir}
		if cert, key, err = e.start(ctx); err != nil {
			return nil, err
		}
		return e.get, useCertificate(conf, cert, key)
	}
	if err := useCertificate(conf, cert, key); err != nil {
		return nil, err
	}
	return func(context.Context) (string, error) {
		if u.TokenFile == "" {
			return u.Token, nil
		}
		b, err := credentials.ReadFile(under(dir, u.TokenFile)) // always: the kubelet renews it
		return strings.TrimSpace(string(b)), err
	}, nil
}

func useCertificate(conf *tls.Config, cert, key []byte) error {
	if cert == nil {
		return nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return errors.New("client-certificate: it and its key are no pair")
	}
	conf.Certificates = []tls.Certificate{pair}
	return nil
}

// isKubeconfig tells whether the file at path is one, if it is there.
func isKubeconfig(path string) (bool, error) {
	data, err := credentials.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	k, err := parseKubeconfig(data)
	return k != nil, err
}
