package registrytest

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// content is what a request asks for.
type content struct {
	status    int // when it is an error
	code      string
	mediaType string
	digest    digest.Digest
	data      []byte
	noRange   bool
}

// reply answers r with c, as the faults that match r change it.
func (s *Server) reply(w http.ResponseWriter, r *http.Request, c content) {
	e := s.effects(r)
	s.wait(r, e.delay)
	for name, value := range e.header {
		w.Header().Set(name, value)
	}
	if e.loop {
		w.Header().Set("Location", r.URL.String())
	}
	if e.status != 0 {
		c = content{status: e.status, code: "INJECTED"}
	}
	if c.status != 0 {
		refuse(w, c.status, c.code, "from registrytest")
		return
	}
	s.count(c.digest, 1, 0)
	off, n, status := c.slice(r.Header.Get("Range"), e.noRange)
	c.head(w.Header(), off, n, status, e)
	if s.opts.NoDigest {
		w.Header().Del("Docker-Content-Digest")
	}
	w.WriteHeader(status)
	if r.Method == http.MethodHead || status == http.StatusRequestedRangeNotSatisfiable {
		return
	}
	data := c.data[off : off+n]
	if e.short > 0 || e.extra > 0 {
		data = append(bytes.Clone(data[:max(n-e.short, 0)]), make([]byte, e.extra)...)
	}
	s.send(w, r, c, data, off, e)
}

// slice decides which part of the data goes out.
func (c content) slice(header string, noRange bool) (off, n int64, status int) {
	size := int64(len(c.data))
	spec, ok := strings.CutPrefix(header, "bytes=")
	first, last, ok2 := strings.Cut(spec, "-")
	if c.noRange || noRange || !ok || !ok2 || strings.Contains(spec, ",") {
		return 0, size, http.StatusOK
	}
	if first == "" { // the last bytes
		n, err := strconv.ParseInt(last, 10, 64)
		if err != nil || n <= 0 || size == 0 {
			return 0, 0, http.StatusRequestedRangeNotSatisfiable
		}
		n = min(n, size)
		return size - n, n, http.StatusPartialContent
	}
	from, err := strconv.ParseInt(first, 10, 64)
	if err != nil || from >= size {
		return 0, 0, http.StatusRequestedRangeNotSatisfiable
	}
	to, err := strconv.ParseInt(last, 10, 64)
	if err != nil || to >= size {
		to = size - 1
	}
	if to < from {
		return 0, 0, http.StatusRequestedRangeNotSatisfiable
	}
	return from, to - from + 1, http.StatusPartialContent
}

func (c content) head(h http.Header, off, n int64, status int, e effects) {
	h.Set("Content-Type", c.mediaType)
	if c.digest != "" {
		h.Set("Docker-Content-Digest", c.digest.String())
	}
	switch status {
	case http.StatusPartialContent:
		shifted := off + e.shift
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", shifted, shifted+n-1, len(c.data)))
	case http.StatusRequestedRangeNotSatisfiable:
		h.Set("Content-Range", fmt.Sprintf("bytes */%d", len(c.data)))
	}
	if !e.chunked {
		h.Set("Content-Length", strconv.FormatInt(n+e.extra, 10))
	}
}

// sendStep is how much is written at a time, bytes.
const sendStep = 32 << 10

// send writes data, which starts at offset off of the whole content.
func (s *Server) send(w http.ResponseWriter, r *http.Request, c content, data []byte, off int64, e effects) {
	for sent := int64(0); sent < int64(len(data)); {
		end := min(sent+sendStep, int64(len(data)))
		if e.stall != nil && sent <= e.stall.after {
			if sent == e.stall.after {
				flush(w)
				s.wait(r, e.stall.length)
			} else {
				end = min(end, e.stall.after)
			}
		}
		if e.truncate != nil {
			if sent >= *e.truncate {
				flush(w)
				if e.reset {
					reset(w)
				}
				panic(http.ErrAbortHandler) // closes the connection
			}
			end = min(end, *e.truncate)
		}
		// Counted first: a client that has the bytes finds them counted.
		s.count(c.digest, 0, end-sent)
		n, err := w.Write(e.spoil(data[sent:end], off+sent))
		s.count(c.digest, 0, int64(n)-(end-sent))
		sent += int64(n)
		if err != nil {
			return
		}
		if e.rate > 0 {
			flush(w)
			s.wait(r, time.Duration(int64(n)*int64(time.Second)/e.rate))
		}
	}
}

// reset has the kernel answer the client with RST.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return // it is closed in the usual way
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // it is open
	}
	_ = conn.Close() // that is the reset
}

func flush(w http.ResponseWriter) {
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
}

// spoil flips the bytes of data, which starts at off, that are to be corrupt.
func (e effects) spoil(data []byte, off int64) []byte {
	copied := false
	for _, at := range e.corrupt {
		if at < off || at >= off+int64(len(data)) {
			continue
		}
		if !copied {
			data, copied = bytes.Clone(data), true
		}
		data[at-off] ^= 0xff
	}
	return data
}
