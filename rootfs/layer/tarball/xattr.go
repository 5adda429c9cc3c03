package tarball

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"strings"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Prefixes of pax records with extended attributes. star and GNU tar use the
// first, bsdtar both.
const (
	schilyXattr     = "SCHILY.xattr."
	libarchiveXattr = "LIBARCHIVE.xattr."
)

// KeepXattr reports whether an attribute belongs into an image, which those do
// that Linux knows: a runtime that unpacks the layer could not set others, such
// as com.apple.provenance.
func KeepXattr(name string) bool {
	switch name {
	case "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	class, rest, _ := strings.Cut(name, ".")
	return rest != "" && (class == "user" || class == "trusted" || class == "security")
}

// Xattrs collects the extended attributes in pax records, sorted by name.
func Xattrs(records map[string]string) ([]index.Xattr, error) {
	var list []index.Xattr
	for key, value := range records {
		name, ok := strings.CutPrefix(key, schilyXattr)
		if !ok {
			if name, ok = strings.CutPrefix(key, libarchiveXattr); !ok {
				continue
			}
			var err error
			if name, value, err = decodeLibarchive(name, value); err != nil {
				return nil, err
			}
			if _, twice := records[schilyXattr+name]; twice {
				continue
			}
		}
		if KeepXattr(name) {
			list = append(list, index.Xattr{Name: name, Value: value})
		}
	}
	index.SortXattrs(list)
	return list, nil
}

// decodeLibarchive decodes a percent-encoded name and a base64 value.
func decodeLibarchive(name, value string) (string, string, error) {
	n, err := url.PathUnescape(name)
	if err != nil {
		return "", "", fmt.Errorf("extended attribute %q: %w", name, err)
	}
	v, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "="))
	if err != nil {
		return "", "", fmt.Errorf("extended attribute %q: %w", name, err)
	}
	return n, string(v), nil
}
