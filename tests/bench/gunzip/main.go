// Command gunzip decompresses files with compress/gzip and prints the seconds
// that it took.
package main

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"log"
	"os"
	"time"
)

func main() {
	log.SetFlags(0)
	from := time.Now()
	for _, name := range os.Args[1:] {
		if err := gunzip(name); err != nil {
			log.Fatalf("gunzip: %s: %v", name, err)
		}
	}
	fmt.Printf("%.2f\n", time.Since(from).Seconds())
}

func gunzip(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := gzip.NewReader(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}
