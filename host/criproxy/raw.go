package criproxy

import (
	"fmt"

	"google.golang.org/grpc/mem"
)

// frame is an encoded message.
type frame []byte

// raw is the codec of messages that are passed on as they are.
type raw struct{}

// Name implements encoding.CodecV2: what is inside of the frames.
func (raw) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, fmt.Errorf("%T is no frame", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(*f)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return fmt.Errorf("%T is no frame", v)
	}
	*f = data.Materialize()
	return nil
}
