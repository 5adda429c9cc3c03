package daemon

import (
	"fmt"
	"net"
	"os"
)

// notifyReady tells a service manager that calls can come (sd_notify(3)). It
// does nothing where there is none. The worker and containers get no way to
// speak for us.
func notifyReady() error {
	const variable = "NOTIFY_SOCKET"
	name := os.Getenv(variable)
	if name == "" {
		return nil
	}
	if err := os.Unsetenv(variable); err != nil {
		return err
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("reach the service manager: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("READY=1\n")); err != nil {
		return fmt.Errorf("tell the service manager: %w", err)
	}
	return nil
}
