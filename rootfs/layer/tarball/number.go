package tarball

import (
	"bytes"
	"errors"
	"strconv"
	"strings"
)

var errNumber = errors.New("invalid number")

// text is a field up to its first zero byte.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// number reads a numeric field: octal digits or, when the first bit is set,
// GNU's base-256, a big-endian two's complement number behind that bit.
func number(b []byte) (int64, error) {
	if b[0]&0x80 != 0 {
		return base256(b)
	}
	digits := text(bytes.Trim(b, " \x00"))
	if digits == "" {
		return 0, nil
	}
	v, err := strconv.ParseUint(digits, 8, 63)
	if err != nil {
		return 0, errNumber
	}
	return int64(v), nil
}

func base256(b []byte) (int64, error) {
	var flip byte // all ones for a negative number
	if b[0]&0x40 != 0 {
		flip = 0xff
	}
	var v uint64
	for i, c := range b {
		c ^= flip
		if i == 0 {
			c &= 0x7f
		}
		if v>>55 > 0 {
			return 0, errNumber
		}
		v = v<<8 | uint64(c)
	}
	if flip != 0 {
		return ^int64(v), nil
	}
	return int64(v), nil
}

// decimal reads a number in a pax record.
func decimal(s string) (int64, error) {
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, errNumber
	}
	return v, nil
}

// paxTime reads seconds with a decimal fraction, digits below the nanosecond
// dropped. nsec is in [0, 1e9) for times before 1970 too.
func paxTime(s string) (sec int64, nsec uint32, err error) {
	whole, frac, _ := strings.Cut(s, ".")
	if sec, err = decimal(whole); err != nil {
		return 0, 0, err
	}
	for i := range 9 {
		nsec *= 10
		if i < len(frac) {
			nsec += uint32(frac[i] - '0')
		}
	}
	if strings.Trim(frac, "0123456789") != "" {
		return 0, 0, errNumber
	}
	if whole[0] == '-' && nsec > 0 {
		if sec-1 > sec {
			return 0, 0, errNumber
		}
		return sec - 1, 1e9 - nsec, nil
	}
	return sec, nsec, nil
}
