package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

const (
	cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdZero, cmdStatus = 0, 1, 3, 4, 6, 7

	optGo, optStructured, optList, optInfo, optSetMeta = 7, 8, 3, 6, 10
)

// hello is the first part of an honest negotiation.
func (s *stub) hello() (net.Conn, error) {
	c, err := net.Dial("unix", s.nbd)
	if err != nil {
		return nil, err
	}
	var b [18]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		c.Close()
		return nil, err
	}
	c.Write([]byte{0, 0, 0, 3})
	return c, nil
}

func optionBytes(opt, size uint32, data []byte) []byte {
	b := append([]byte("IHAVEOPT"), make([]byte, 8)...)
	binary.BigEndian.PutUint32(b[8:], opt)
	binary.BigEndian.PutUint32(b[12:], size)
	return append(b, data...)
}

// connect negotiates like QEMU, without structured replies.
func (s *stub) connect() (net.Conn, error) {
	c, err := s.hello()
	if err != nil {
		return nil, err
	}
	data := append([]byte{0, 0, 0, 4}, "disk\x00\x00"...)
	c.Write(optionBytes(optGo, uint32(len(data)), data))
	for {
		var h [20]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			c.Close()
			return nil, err
		}
		io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(h[16:])))
		if kind := binary.BigEndian.Uint32(h[12:]); kind == 1 {
			return c, nil
		} else if kind>>31 != 0 {
			c.Close()
			return nil, fmt.Errorf("refused: %#x", kind)
		}
	}
}

func request(command uint16, cookie, off uint64, n uint32) []byte {
	b := make([]byte, 28)
	binary.BigEndian.PutUint32(b, 0x25609513)
	binary.BigEndian.PutUint16(b[6:], command)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint64(b[16:], off)
	binary.BigEndian.PutUint32(b[24:], n)
	return b
}

// ask does one request and reads its answer.
func ask(c net.Conn, command uint16, off uint64, n uint32, data []byte) ([]byte, error) {
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write(append(request(command, 7, off, n), data...)); err != nil {
		return nil, err
	}
	var h [16]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		return nil, err
	}
	if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
		return nil, fmt.Errorf("error %d", e)
	}
	if command != cmdRead {
		return nil, nil
	}
	got := make([]byte, n)
	_, err := io.ReadFull(c, got)
	return got, err
}

// useDisk is the honest guest: it writes, flushes and reads back for ever, and says on its console how it goes.
func (s *stub) useDisk() {
	for round := 0; ; {
		c, err := s.connect()
		if err != nil {
			time.Sleep(100 * time.Millisecond)
			continue
		}
		for ; err == nil; round++ {
			began := time.Now()
			if err = once(c, uint64(round)); err == nil {
				s.say("disk %d %d", round, time.Since(began).Milliseconds())
			}
			time.Sleep(200 * time.Millisecond)
		}
		if errors.Is(err, errCorrupt) {
			s.say("disk corrupt: %v", err)
		}
		c.Close()
	}
}

var errCorrupt = errors.New("what was read is not what was written")

// once uses the end of the disk, where the image has no file.
func once(c net.Conn, round uint64) error {
	off := 24<<20 + round%256*4096
	want := bytes.Repeat(binary.BigEndian.AppendUint64(nil, round), 512)
	if _, err := ask(c, cmdWrite, off, 4096, want); err != nil {
		return err
	}
	if _, err := ask(c, cmdFlush, 0, 0, nil); err != nil {
		return err
	}
	got, err := ask(c, cmdRead, off, 4096, nil)
	if err == nil && !bytes.Equal(got, want) {
		err = errCorrupt
	}
	return err
}

// negotiateBadly begins connections in every way but the right one.
func (s *stub) negotiateBadly() {
	long := bytes.Repeat([]byte{'A'}, 1<<20)
	ways := [][]byte{
		optionBytes(optGo, 0xffffffff, long), optionBytes(optGo, 1<<20, long), optionBytes(1, 8192, long[:8192]),
		bytes.Repeat(optionBytes(optList, 0, nil), 4096), bytes.Repeat(optionBytes(optInfo, 10, append([]byte{0xff, 0xff, 0xff, 0xff}, 0, 0, 0, 0, 0, 0)), 4096),
		bytes.Repeat(optionBytes(optStructured, 0, nil), 4096), optionBytes(optSetMeta, 12, []byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}),
		long, nil, {0},
	}
	var held []net.Conn
	for i := 0; ; i++ {
		c, err := s.hello()
		if err != nil {
			for _, c := range held {
				c.Close()
			}
			held = nil
			continue
		}
		if i%64 == 63 { // half open, for as long as it is borne
			held = append(held, c)
			continue
		}
		c.SetDeadline(time.Now().Add(time.Second))
		c.Write(ways[i%len(ways)])
		if i%3 == 0 {
			io.CopyN(io.Discard, c, 1<<16)
		}
		c.Close()
	}
}

// requestBadly opens what connections there are and sends requests that no guest's driver would.
func (s *stub) requestBadly() {
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for {
				if c, err := s.connect(); err == nil {
					c.SetDeadline(time.Now().Add(3 * time.Second))
					badRequests[i%len(badRequests)](c)
					c.Close()
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	wg.Wait()
}

var badRequests = []func(net.Conn){
	func(c net.Conn) { // many large reads, of which no answer is taken
		flood(c, func() []byte { return request(cmdRead, 1, 0, 32<<20) })
	},
	func(c net.Conn) { // a write that never ends
		c.Write(request(cmdWrite, 1, 0, 32<<20))
		c.Write(make([]byte, 31<<20))
		drain(c)
	},
	func(c net.Conn) { // sizes and places that overflow
		for _, off := range []uint64{0, 1 << 63, ^uint64(0), 32 << 20} {
			for _, n := range []uint32{0, 1, 0x7fffffff, 0xffffffff} {
				for _, command := range []uint16{cmdRead, cmdTrim, cmdZero, cmdStatus, 99} {
					c.Write(request(command, off, off, n))
				}
			}
		}
		drain(c)
	},
	func(c net.Conn) { c.Write(request(cmdWrite, 1, 0, 0xffffffff)); drain(c) },
	func(c net.Conn) { c.Write(bytes.Repeat([]byte{0xff}, 1<<20)); drain(c) },
	func(c net.Conn) { // flushes without end, and zeros all over
		flood(c, func() []byte { return append(request(cmdFlush, 2, 0, 0), request(cmdZero, 3, 0, 32<<20)...) })
	},
	func(c net.Conn) { // what the file index has to follow: garbage all over the file system and its journal
		go drain(c)
		block := make([]byte, 4096)
		flood(c, func() []byte {
			for i := range block {
				block[i] = byte(rand.Uint32())
			}
			return append(request(cmdWrite, 4, uint64(rand.Uint32N(8192))*4096, 4096), block...)
		})
	},
	func(c net.Conn) { // the watched file, as fast as it goes
		go drain(c)
		flood(c, func() []byte {
			var b []byte
			for i := range uint64(256) {
				b = append(b, request(cmdRead, i, (i*32)<<12, 128<<10)...)
			}
			return b
		})
	},
}

// readAll reads the whole disk, small and again and again: each watched file is touched thousands of times a second.
func (s *stub) readAll() {
	for {
		c, err := s.connect()
		if err != nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		go drain(c)
		flood(c, func() []byte {
			var b []byte
			for i := range uint64(4096) {
				b = append(b, request(cmdRead, i, i<<12, 4096)...)
			}
			return b
		})
		c.Close()
	}
}

// readShadow looks for the watched file and then reads it, and nothing else, as fast as it goes.
func (s *stub) readShadow() {
	var at uint64
	for off := uint64(0); at == 0 && off < 32<<20; off += 1 << 20 {
		c, err := s.connect()
		if err != nil {
			return
		}
		chunk, _ := ask(c, cmdRead, off, 1<<20, nil)
		if i := bytes.Index(chunk, []byte("root:*:1:")); i >= 0 {
			at = off + uint64(i)
		}
		c.Close()
	}
	c, err := s.connect()
	if err != nil || at == 0 {
		return
	}
	go drain(c)
	flood(c, same(string(bytes.Repeat(request(cmdRead, 1, at, 4096), 1024))))
}
