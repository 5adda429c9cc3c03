package containerd

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// manager is to tatami-host what systemd is: it learns when the program is ready
// (sd_notify(3)) and keeps descriptors for it over restarts (FDSTORE=1 in
// sd_pid_notify_with_fds(3), given back as sd_listen_fds(3) says).
type manager struct {
	socket string

	mu    sync.Mutex
	ready bool                // protected by mu
	store map[string]*os.File // by FDNAME; protected by mu
}

func startManager(t *testing.T, dir string) *manager {
	t.Helper()
	m := &manager{socket: filepath.Join(dir, "notify"), store: map[string]*os.File{}}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.listen(conn)
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
		for _, f := range m.store {
			f.Close()
		}
	})
	return m
}

// listen takes messages until the socket is closed.
func (m *manager) listen(conn *net.UnixConn) {
	text, rights := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oobn, _, _, err := conn.ReadMsgUnix(text, rights)
		if err != nil {
			return
		}
		m.message(string(text[:n]), received(rights[:oobn]))
	}
}

// received unpacks the descriptors that came with a message.
func received(rights []byte) (files []*os.File) {
	messages, _ := unix.ParseSocketControlMessage(rights) // made by the kernel
	for _, msg := range messages {
		fds, _ := unix.ParseUnixRights(&msg) // another kind has none
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "stored"))
		}
	}
	return files
}

func (m *manager) message(text string, files []*os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	said := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		said[key] = value
	}
	m.ready = m.ready || said["READY"] == "1"
	name := said["FDNAME"]
	old := m.store[name]
	switch {
	case said["FDSTOREREMOVE"] == "1" && old != nil:
		old.Close()
		delete(m.store, name)
	case said["FDSTORE"] == "1" && len(files) == 1:
		if old != nil {
			old.Close()
		}
		m.store[name] = files[0]
		return
	}
	for _, f := range files { // a barrier, whose sender waits for this
		f.Close()
	}
}

// given returns what the next start gets, and expects it to say that it is ready.
func (m *manager) given() (env []string, files []*os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ready = false
	var names []string
	for name, f := range m.store {
		names, files = append(names, name), append(files, f)
	}
	return []string{"NOTIFY_SOCKET=" + m.socket, fmt.Sprintf("LISTEN_FDS=%d", len(files)),
		"LISTEN_FDNAMES=" + strings.Join(names, ":")}, files
}

func (m *manager) isReady() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ready
}
