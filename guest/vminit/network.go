package vminit

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Net is the address of the machine's network card.
type Net struct {
	Interface string // "" is the first that is not the loopback
	Address   string // with prefix length; "" sets up no card
	Gateway   string
	DNS       []string
}

// cardTimeout bounds how long a card may take to appear after its module was
// loaded.
const cardTimeout = 2 * time.Second

func setUpNetwork(cfg Config) error {
	if cfg.Hostname != "" {
		if err := unix.Sethostname([]byte(cfg.Hostname)); err != nil {
			return fmt.Errorf("set the host name: %w", err)
		}
	}
	if err := writeNetFiles(cfg.Hostname, cfg.Net.DNS); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set the loopback up: %w", err)
	}
	if cfg.Net.Address == "" {
		return nil
	}
	return cfg.Net.setUp()
}

func (n Net) setUp() error {
	link, err := n.wait()
	if err != nil {
		return err
	}
	name := link.Attrs().Name
	addr, err := netlink.ParseAddr(n.Address)
	if err != nil {
		return fmt.Errorf("address %q: %w", n.Address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, n.Address, err)
	}
	if n.Gateway == "" {
		return nil
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(n.Gateway)}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("route through %s: %w", n.Gateway, err)
	}
	return nil
}

func (n Net) wait() (netlink.Link, error) {
	for deadline := time.Now().Add(cardTimeout); ; time.Sleep(10 * time.Millisecond) {
		link, err := n.find()
		if err == nil || time.Now().After(deadline) {
			return link, err
		}
	}
}

func (n Net) find() (netlink.Link, error) {
	if n.Interface != "" {
		link, err := netlink.LinkByName(n.Interface)
		if err != nil {
			return nil, fmt.Errorf("find network interface %s: %w", n.Interface, err)
		}
		return link, nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback == 0 && l.Attrs().EncapType == "ether" {
			return l, nil
		}
	}
	return nil, errors.New("find a network card: there is none; take net.address out of the configuration, or add one")
}

func writeNetFiles(hostname string, dns []string) error {
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	hosts := "127.0.0.1 localhost " + hostname + "\n::1 localhost\n"
	if err := os.WriteFile("/etc/hosts", []byte(hosts), 0o644); err != nil {
		return err
	}
	var resolv strings.Builder
	for _, server := range dns {
		resolv.WriteString("nameserver " + server + "\n")
	}
	return os.WriteFile("/etc/resolv.conf", []byte(resolv.String()), 0o644)
}
