package tarball

import (
	"errors"
	"strconv"
	"strings"
)

// maxSpecial bounds what precedes an entry: a pax header, a long name, or a
// sparse map, in bytes.
const maxSpecial = 1 << 20

// Keys of GNU's sparse records.
const (
	sparseMajor     = "GNU.sparse.major"
	sparseMinor     = "GNU.sparse.minor"
	sparseName      = "GNU.sparse.name"
	sparseSize      = "GNU.sparse.size"
	sparseRealSize  = "GNU.sparse.realsize"
	sparseMap       = "GNU.sparse.map"
	sparseNumBlocks = "GNU.sparse.numblocks"
	sparseOffset    = "GNU.sparse.offset"
	sparseNumBytes  = "GNU.sparse.numbytes"
)

var errRecord = errors.New("invalid pax record")

// parsePax reads the records of a pax header. The map of sparse format 0.0,
// which repeats two keys, becomes that of format 0.1, which joins their values.
func parsePax(s string) (map[string]string, error) {
	records := make(map[string]string)
	var pieces []string
	for s != "" {
		key, value, rest, err := paxRecord(s)
		if err != nil {
			return nil, err
		}
		s = rest
		if key != sparseOffset && key != sparseNumBytes {
			records[key] = value
			continue
		}
		if (len(pieces)%2 == 0) != (key == sparseOffset) || strings.Contains(value, ",") {
			return nil, errSparse
		}
		pieces = append(pieces, value)
	}
	if len(pieces) > 0 {
		records[sparseMap] = strings.Join(pieces, ",")
	}
	return records, nil
}

// paxRecord reads "<length> <key>=<value>\n", where length counts all of it.
func paxRecord(s string) (key, value, rest string, err error) {
	digits, _, ok := strings.Cut(s, " ")
	n, numErr := strconv.ParseInt(digits, 10, 64)
	if !ok || numErr != nil || n > int64(len(s)) || n < int64(len(digits))+2 || s[n-1] != '\n' {
		return "", "", "", errRecord
	}
	key, value, ok = strings.Cut(s[len(digits)+1:n-1], "=")
	if !ok || key == "" || strings.Contains(key, "\x00") {
		return "", "", "", errRecord
	}
	switch key {
	case "path", "linkpath", "uname", "gname":
		if strings.Contains(value, "\x00") {
			return "", "", "", errRecord
		}
	}
	return key, value, s[n:], nil
}

// merge puts the records that replace header fields into them. An empty value
// keeps the field.
func (h *header) merge(records map[string]string) (err error) {
	h.pax = records
	for key, value := range records {
		if value == "" {
			continue
		}
		switch key {
		case "path":
			h.name = value
		case "linkpath":
			h.link = value
		case "uid":
			h.uid, err = decimal(value)
		case "gid":
			h.gid, err = decimal(value)
		case "size":
			h.size, err = decimal(value)
		case "mtime":
			h.sec, h.nsec, err = paxTime(value)
		}
		if err != nil {
			return errors.Join(err, errors.New("pax record "+key))
		}
	}
	return nil
}
