package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// qmp is a connection to QEMU's monitor (docs/interop/qmp-spec.rst of QEMU).
type qmp struct {
	conn net.Conn
	r    *json.Decoder
}

// qmpWait bounds one command, and the unplugging of a disk by the guest.
const qmpWait = 20 * time.Second

func dialQMP(ctx context.Context, path string) (*qmp, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmp{conn: conn, r: json.NewDecoder(conn)}
	var greeting any
	if err := q.r.Decode(&greeting); err != nil {
		return nil, err
	}
	return q, q.run("qmp_capabilities", nil)
}

// message is an answer or an event.
type message struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Device string `json:"device"`
	} `json:"data"`
}

// run executes a command and passes over events.
func (q *qmp) run(command string, arguments any) error {
	if err := q.conn.SetDeadline(time.Now().Add(qmpWait)); err != nil {
		return err
	}
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(q.conn).Encode(request); err != nil {
		return err
	}
	for {
		var m message
		if err := q.r.Decode(&m); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		switch {
		case m.Error != nil:
			return fmt.Errorf("%s: %s", command, m.Error.Desc)
		case m.Return != nil:
			return nil
		}
	}
}

// attach plugs a disk into a port.
func (q *qmp) attach(d disk, port string) error {
	node := "node-" + port
	err := q.run("blockdev-add", map[string]any{"node-name": node, "driver": "raw", "read-only": d.readOnly,
		"file": map[string]any{"driver": "file", "filename": d.file, "read-only": d.readOnly}})
	if err != nil {
		return err
	}
	return q.run("device_add", map[string]any{"driver": "virtio-blk-pci", "id": "disk-" + port, "drive": node, "bus": port})
}

// detach unplugs the disk of a port and closes its file.
func (q *qmp) detach(port string) error {
	if err := q.run("device_del", map[string]any{"id": "disk-" + port}); err != nil {
		return err
	}
	for {
		var m message
		if err := q.r.Decode(&m); err != nil {
			return fmt.Errorf("the guest does not let go of the disk in %s: %w", port, err)
		}
		if m.Event == "DEVICE_DELETED" && m.Data.Device == "disk-"+port {
			return q.run("blockdev-del", map[string]any{"node-name": "node-" + port})
		}
	}
}
