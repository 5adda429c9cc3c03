package hosts

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// readFile reads a file that a setting names, relative to the directory of hosts.toml.
type readFile func(name string) ([]byte, error)

// host makes a registry.Host of the URL of a host and its settings.
func (s settings) host(address string, read readFile) (*registry.Host, error) {
	h := &registry.Host{}
	if err := locate(h, address, s.OverridePath); err != nil {
		return nil, err
	}
	if err := s.apply(h, read); err != nil {
		return nil, fmt.Errorf("host %s: %w", h.Name, err)
	}
	return h, nil
}

// apply sets all of h but where it is.
func (s settings) apply(h *registry.Host, read readFile) (err error) {
	if h.Capabilities, err = capabilities(s.Capabilities); err != nil {
		return err
	}
	if h.Header, err = header(s.Header); err != nil {
		return err
	}
	if h.DialTimeout, err = s.dialTimeout(); err != nil {
		return err
	}
	if h.TLS, err = s.tls(read); err != nil {
		return err
	}
	_, port, _ := net.SplitHostPort(h.Name) // none is ""
	h.Upgrade = h.Scheme == "http" && h.TLS != nil && port != "80"
	return nil
}

// locate reads the URL of a host. The path of a URL is where the API is: "/v2"
// is added unless it is there, or override is set.
func locate(h *registry.Host, address string, override bool) error {
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("the URL of a host cannot be read: write https://host:port/path") // it may hold a password
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("the URL of host %s has more than a path: credentials belong elsewhere", u.Host)
	}
	h.Scheme, h.Name = u.Scheme, strings.TrimSuffix(u.Host, ":") // an empty port
	if u.Path != "" {
		h.Path = strings.TrimSuffix(path.Clean(u.Path), "/")
	}
	if !override && !strings.HasSuffix(h.Path, "/v2") {
		h.Path += "/v2"
	}
	return nil
}

func capabilities(names []string) (c registry.Capabilities, err error) {
	if len(names) == 0 {
		return registry.CanAll, nil
	}
	for _, name := range names {
		bit, ok := map[string]registry.Capabilities{
			"pull": registry.CanPull, "resolve": registry.CanResolve, "push": registry.CanPush, "referrers": registry.CanReferrers,
		}[strings.ToLower(name)]
		if !ok {
			return 0, fmt.Errorf("capabilities %q: give pull, resolve, push or referrers", name)
		}
		c |= bit
	}
	return c, nil
}

// own are headers that say what a request is; the client sets them.
var own = map[string]bool{
	"Accept": true, "Accept-Encoding": true, "Connection": true, "Content-Length": true, "Content-Type": true,
	"Host": true, "Range": true, "Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true,
}

// header never names a value in its errors.
func header(values map[string]any) (http.Header, error) {
	if len(values) == 0 {
		return nil, nil
	}
	h := http.Header{}
	for name, v := range values {
		list, err := texts("header "+name, v)
		if err != nil {
			return nil, err
		}
		name = http.CanonicalHeaderKey(name)
		if !httpguts.ValidHeaderFieldName(name) || own[name] {
			return nil, fmt.Errorf("header %q: it cannot be set", name)
		}
		for _, text := range list {
			if !httpguts.ValidHeaderFieldValue(text) {
				return nil, fmt.Errorf("header %s: its value has characters that a header cannot have", name)
			}
		}
		h[name] = append(h[name], list...)
	}
	return h, nil
}

// tls returns nil when there is nothing about TLS in the settings.
func (s settings) tls(read readFile) (*tls.Config, error) {
	cas, err := texts("ca", s.CA)
	if err != nil {
		return nil, err
	}
	clients, err := pairs(s.Client)
	if err != nil {
		return nil, err
	}
	if len(cas) == 0 && len(clients) == 0 && s.SkipVerify == nil {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: s.SkipVerify != nil && *s.SkipVerify}
	if c.RootCAs, err = pool(cas, read); err != nil {
		return nil, err
	}
	for _, p := range clients {
		cert, err := p.load(read)
		if err != nil {
			return nil, err
		}
		c.Certificates = append(c.Certificates, cert)
	}
	return c, nil
}

// pool returns the system's authorities and those of files; nil without files.
func pool(files []string, read readFile) (*x509.CertPool, error) {
	if len(files) == 0 {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("read the system's certificates: %w", err)
	}
	for _, name := range files {
		text, err := read(name)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		if !pool.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("ca %s: there is no certificate in it (PEM)", name)
		}
	}
	return pool, nil
}

func (p pair) load(read readFile) (tls.Certificate, error) {
	cert, err := read(p.cert)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("client: %w", err)
	}
	key := cert
	if p.key != "" {
		if key, err = read(p.key); err != nil {
			return tls.Certificate{}, fmt.Errorf("client: %w", err)
		}
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("client %s: %w", p.cert, err)
	}
	return pair, nil
}
