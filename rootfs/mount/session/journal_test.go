package session

import (
	"encoding/binary"
	"log/slog"
	"os"
	"testing"
)

func message(opcode uint32, unique, arg uint64) []byte {
	b := make([]byte, inHeaderSize+8)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], opcode)
	binary.NativeEndian.PutUint64(b[8:], unique)
	binary.NativeEndian.PutUint64(b[inHeaderSize:], arg)
	return b
}

// journalWorker is a worker's end of a journal.
type journalWorker struct {
	t *testing.T
	f *os.File
}

func attachWorker(t *testing.T, j *journal) journalWorker {
	t.Helper()
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	j.attach(ours)
	return journalWorker{t, theirs}
}

func (w journalWorker) expect(opcode uint32, unique uint64) {
	w.t.Helper()
	buf := make([]byte, BufferSize)
	n, err := w.f.Read(buf)
	if err != nil {
		w.t.Fatal(err)
	}
	h, err := parseHeader(buf[:n])
	if err != nil || h.opcode != opcode || h.unique != unique {
		w.t.Fatalf("worker got %+v (%v), want opcode %d of request %d", h, err, opcode, unique)
	}
}

func (w journalWorker) acknowledge(j *journal, unique uint64) {
	w.t.Helper()
	if _, err := w.f.Write(binary.NativeEndian.AppendUint64(nil, unique)); err != nil {
		w.t.Fatal(err)
	}
	for {
		j.mu.Lock()
		_, there := j.pending[unique]
		j.mu.Unlock()
		if !there {
			return
		}
	}
}

// die closes the worker's end and waits until the journal has noticed.
func (w journalWorker) die(j *journal) {
	w.t.Helper()
	if err := w.f.Close(); err != nil {
		w.t.Fatal(err)
	}
	j.detach()
}

func newTestJournal() *journal {
	return &journal{pending: make(map[uint64]*pendingRequest), attached: make(chan struct{}), log: slog.New(slog.DiscardHandler)}
}

const opRead = 15

func TestJournalHandsOverWhatIsUnanswered(t *testing.T) {
	j := newTestJournal()
	first := attachWorker(t, j)
	for _, unique := range []uint64{2, 4, 6, 8} {
		j.forward(message(opRead, unique, 0))
		first.expect(opRead, unique)
	}
	j.forward(message(opForget, 10, 0))
	j.forward(message(opBatchForget, 12, 0))
	j.forward(message(opInterrupt, 7, 6))
	first.expect(opInterrupt, 7) // no FORGET before it
	j.forward(message(opInterrupt, 101, 100))
	first.acknowledge(j, 4)
	first.die(j)

	j.forward(message(opRead, 14, 0)) // while there is no worker
	second := attachWorker(t, j)
	second.expect(opRead, 2)
	second.expect(opRead, 6)
	second.expect(opInterrupt, 7) // behind its request
	second.expect(opRead, 8)
	second.expect(opRead, 14)
	for _, unique := range []uint64{2, 6, 8, 14} {
		second.acknowledge(j, unique)
	}
	second.die(j)

	third := attachWorker(t, j)
	j.forward(message(opRead, 16, 0))
	third.expect(opRead, 16) // nothing is handed over a third time
	third.die(j)
}

// A worker that reads nothing must not block the next one, whatever the
// capacity of the socket.
func TestJournalManyUnanswered(t *testing.T) {
	j := newTestJournal()
	const many = 5000
	for i := range uint64(many) {
		j.forward(message(opRead, 2*i+2, 0))
	}
	deaf := attachWorker(t, j)
	deaf.die(j)
	w := attachWorker(t, j)
	for i := range uint64(many) {
		w.expect(opRead, 2*i+2)
		w.acknowledge(j, 2*i+2)
	}
	w.die(j)
	if len(j.pending) != 0 {
		t.Errorf("%d requests are still remembered", len(j.pending))
	}
}

func TestJournalDropsUnreadable(t *testing.T) {
	j := newTestJournal()
	j.forward([]byte{1, 2, 3})
	j.forward(message(opInterrupt, 7, 6)[:inHeaderSize])
	if len(j.pending) != 0 {
		t.Error("unreadable requests are remembered")
	}
}

func FuzzJournalForward(f *testing.F) {
	f.Add(message(opRead, 2, 0))
	f.Add(message(opInterrupt, 3, 2))
	f.Add(message(opInterrupt, 3, 2)[:inHeaderSize])
	f.Fuzz(func(t *testing.T, b []byte) {
		j := newTestJournal()
		j.forward(message(opRead, 2, 0))
		j.forward(b)
	})
}
