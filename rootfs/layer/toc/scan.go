package toc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
)

// scanner reads JSON that is laid out as TOCs are. It exists because a TOC
// takes several times as long through encoding/json, and a container waits for
// it. Values that are not plain (escapes, other than ASCII, objects) it cuts
// out and leaves to encoding/json, so that what they mean is the same.
type scanner struct {
	data []byte
	pos  int
}

func (s *scanner) fail(what string) error {
	return fmt.Errorf("invalid JSON at byte %d: %s", s.pos, what)
}

// peek skips white space and returns the next byte, 0 at the end.
func (s *scanner) peek() byte {
	for ; s.pos < len(s.data); s.pos++ {
		switch c := s.data[s.pos]; c {
		case ' ', '\t', '\n', '\r':
		default:
			return c
		}
	}
	return 0
}

// expect takes a structural character.
func (s *scanner) expect(c byte) error {
	if s.peek() != c {
		return s.fail(fmt.Sprintf("no %q", c))
	}
	s.pos++
	return nil
}

// each calls f at every element between open and end.
func (s *scanner) each(open, end byte, f func() error) error {
	if err := s.expect(open); err != nil {
		return err
	}
	if s.peek() == end {
		s.pos++
		return nil
	}
	for {
		if err := f(); err != nil {
			return err
		}
		if s.peek() == end {
			s.pos++
			return nil
		}
		if err := s.expect(','); err != nil {
			return err
		}
	}
}

// object calls f at the value of every key. key is valid during the call.
func (s *scanner) object(f func(key []byte) error) error {
	return s.each('{', '}', func() error {
		key, err := s.text()
		if err != nil {
			return err
		}
		if err := s.expect(':'); err != nil {
			return err
		}
		return f(key)
	})
}

// text reads a string; the result may be part of the data. null is empty.
func (s *scanner) text() ([]byte, error) {
	if s.null() {
		return nil, nil
	}
	if err := s.expect('"'); err != nil {
		return nil, err
	}
	start := s.pos
	for ; s.pos < len(s.data); s.pos++ {
		switch c := s.data[s.pos]; {
		case c == '"':
			s.pos++
			return s.data[start : s.pos-1], nil
		case c == '\\' || c < ' ' || c > '~':
			return s.oddText(start - 1)
		}
	}
	return nil, s.fail("string without an end")
}

// oddText reads a string that begins at byte start with the means of
// encoding/json.
func (s *scanner) oddText(start int) ([]byte, error) {
	for ; s.pos < len(s.data) && s.data[s.pos] != '"'; s.pos++ {
		if s.data[s.pos] == '\\' {
			s.pos++
		}
	}
	if s.pos >= len(s.data) {
		return nil, s.fail("string without an end")
	}
	s.pos++
	var v string
	err := json.Unmarshal(s.data[start:s.pos], &v)
	return []byte(v), err
}

// null takes a null if there is one.
func (s *scanner) null() bool {
	if s.peek() == 'n' && bytes.HasPrefix(s.data[s.pos:], []byte("null")) {
		s.pos += 4
		return true
	}
	return false
}

// number reads an integer. null is 0.
func (s *scanner) number() (int64, error) {
	if s.null() {
		return 0, nil
	}
	sign := int64(1)
	if s.peek() == '-' {
		sign = -1
		s.pos++
	}
	start, v := s.pos, int64(0)
	for ; s.pos < len(s.data) && s.data[s.pos]-'0' <= 9; s.pos++ {
		digit := int64(s.data[s.pos] - '0')
		if v > (math.MaxInt64-digit)/10 {
			return 0, s.fail("number out of range")
		}
		v = v*10 + digit
	}
	if s.pos == start || s.data[start] == '0' && s.pos > start+1 {
		return 0, s.fail("no integer")
	}
	return sign * v, nil
}

// maxDepth bounds how deep values that are skipped may nest.
const maxDepth = 100

// value cuts out a value of any kind, which encoding/json says is valid.
func (s *scanner) value() ([]byte, error) {
	s.peek()
	start := s.pos
	if err := s.skip(0); err != nil {
		return nil, err
	}
	if v := s.data[start:s.pos]; json.Valid(v) {
		return v, nil
	}
	return nil, s.fail("invalid value")
}

// skip finds the end of a value.
func (s *scanner) skip(depth int) error {
	if depth > maxDepth {
		return errors.New("JSON is nested too deep")
	}
	switch s.peek() {
	case '"':
		_, err := s.text()
		return err
	case '[':
		return s.each('[', ']', func() error { return s.skip(depth + 1) })
	case '{':
		return s.object(func([]byte) error { return s.skip(depth + 1) })
	}
	start := s.pos
	for s.pos < len(s.data) && bytes.IndexByte([]byte(",]} \t\r\n"), s.data[s.pos]) < 0 {
		s.pos++
	}
	if s.pos == start {
		return s.fail("no value")
	}
	return nil
}
