package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

// execToken gets tokens of a program (client.authentication.k8s.io, ExecCredential:
// kubernetes staging/src/k8s.io/client-go/pkg/apis/clientauthentication/v1/types.go).
type execToken struct {
	exec kubeExec
	dir  string

	mu      sync.Mutex
	token   string    // protected by mu
	expires time.Time // zero: until it is refused; protected by mu
}

type execCredential struct {
	Status struct {
		Token      string    `json:"token"`
		Expiration time.Time `json:"expirationTimestamp"`
		Cert       string    `json:"clientCertificateData"` // PEM
		Key        string    `json:"clientKeyData"`
	} `json:"status"`
}

const execVersions = "client.authentication.k8s.io/"

// start runs the program for the first time; a certificate lives as long as the
// connection.
func (e *execToken) start(ctx context.Context) (cert, key []byte, err error) {
	if !strings.HasPrefix(e.exec.APIVersion, execVersions) || e.exec.Command == "" {
		return nil, nil, fmt.Errorf("exec: give a command and apiVersion %sv1", execVersions)
	}
	if e.exec.ClusterInfo {
		return nil, nil, errors.New("exec: provideClusterInfo is not supported")
	}
	c, err := e.run(ctx)
	if err != nil {
		return nil, nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.token, e.expires = c.Status.Token, c.Status.Expiration
	if c.Status.Cert == "" {
		return nil, nil, nil
	}
	return []byte(c.Status.Cert), []byte(c.Status.Key), nil
}

func (e *execToken) get(ctx context.Context) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.expires.IsZero() || time.Until(e.expires) > apiTimeout {
		return e.token, nil
	}
	c, err := e.run(ctx)
	if err != nil {
		return "", err
	}
	e.token, e.expires = c.Status.Token, c.Status.Expiration
	return e.token, nil
}

func (e *execToken) run(ctx context.Context) (c execCredential, err error) {
	p := credentials.Program{Path: e.exec.Command, Args: e.exec.Args}
	if strings.Contains(p.Path, "/") {
		p.Path = under(e.dir, p.Path)
	}
	for _, v := range e.exec.Env {
		p.Env = append(p.Env, v.Name+"="+v.Value)
	}
	p.Env = append(p.Env, fmt.Sprintf(`KUBERNETES_EXEC_INFO={"kind":"ExecCredential","apiVersion":%q,"spec":{"interactive":false}}`, e.exec.APIVersion))
	out, err := p.Run(ctx, nil)
	if err != nil {
		return c, fmt.Errorf("exec: %s: %w (run it by hand to see why)", p.Path, err)
	}
	if json.Unmarshal(out, &c) != nil || cmp.Or(c.Status.Token, c.Status.Cert) == "" {
		return c, fmt.Errorf("exec: %s: its answer is no ExecCredential with a token or a certificate", p.Path)
	}
	return c, nil
}
