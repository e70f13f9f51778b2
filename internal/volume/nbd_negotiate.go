package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// errDone is the end of a connection as the client wished it.
var errDone = errors.New("nbd: client is done")

// agreed is what a negotiation ends with.
type agreed struct {
	structured bool
	allocation bool // base:allocation was chosen
}

// negotiator speaks the first part of a connection, fixed newstyle.
type negotiator struct {
	rw     io.ReadWriter
	name   string // of the export; "" names it too
	simple bool   // structured replies are not offered
	size   int64
	flags  uint16
	agreed agreed
}

func (n *negotiator) run() (agreed, error) {
	var hello [18]byte
	binary.BigEndian.PutUint64(hello[:], nbdMagic)
	binary.BigEndian.PutUint64(hello[8:], optMagic)
	binary.BigEndian.PutUint16(hello[16:], flagFixedNewstyle|flagNoZeroes)
	if _, err := n.rw.Write(hello[:]); err != nil {
		return agreed{}, err
	}
	var b [4]byte
	if _, err := io.ReadFull(n.rw, b[:]); err != nil {
		return agreed{}, err
	}
	client := binary.BigEndian.Uint32(b[:])
	if client&^(flagFixedNewstyle|flagNoZeroes) != 0 || client&flagFixedNewstyle == 0 {
		return agreed{}, fmt.Errorf("%w: client flags %#x", ErrNegotiation, client)
	}
	for range maxOptions {
		done, err := n.option(client&flagNoZeroes != 0)
		if err != nil {
			return agreed{}, err
		}
		if done {
			return n.agreed, nil
		}
	}
	return agreed{}, fmt.Errorf("%w: more than %d options", ErrNegotiation, maxOptions)
}

// option reads and answers one option; done means that transmission begins.
func (n *negotiator) option(noZeroes bool) (done bool, err error) {
	var h [16]byte
	if _, err := io.ReadFull(n.rw, h[:]); err != nil {
		return false, err
	}
	if m := binary.BigEndian.Uint64(h[:]); m != optMagic {
		return false, fmt.Errorf("%w: option magic %#x", ErrNegotiation, m)
	}
	opt, size := binary.BigEndian.Uint32(h[8:]), binary.BigEndian.Uint32(h[12:])
	if size > maxOption {
		return false, n.tooBig(opt, size)
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(n.rw, data); err != nil {
		return false, err
	}
	switch opt {
	case optExportName:
		return true, n.exportName(string(data), noZeroes)
	case optAbort:
		n.reply(opt, repAck, nil)
		return false, errDone
	case optList:
		return false, n.list(data)
	case optInfo, optGo:
		return n.info(opt, data)
	case optStructuredReply:
		if n.simple {
			break
		}
		return false, n.structuredReply(data)
	case optListMeta, optSetMeta:
		return false, n.metaContext(opt, data)
	}
	return false, n.reply(opt, repErrUnsup, nil)
}

// tooBig skips an option that no honest client sends, up to a limit.
func (n *negotiator) tooBig(opt, size uint32) error {
	if size > 1<<20 {
		return fmt.Errorf("%w: option of %d bytes", ErrNegotiation, size)
	}
	if _, err := io.CopyN(io.Discard, n.rw, int64(size)); err != nil {
		return err
	}
	return n.reply(opt, repErrTooBig, nil)
}

func (n *negotiator) reply(opt, kind uint32, data []byte) error {
	b := make([]byte, 20, 20+len(data))
	binary.BigEndian.PutUint64(b, optReplyMagic)
	binary.BigEndian.PutUint32(b[8:], opt)
	binary.BigEndian.PutUint32(b[12:], kind)
	binary.BigEndian.PutUint32(b[16:], uint32(len(data)))
	_, err := n.rw.Write(append(b, data...))
	return err
}

func (n *negotiator) known(name string) bool { return name == "" || name == n.name }

func (n *negotiator) exportName(name string, noZeroes bool) error {
	if !n.known(name) {
		return fmt.Errorf("%w: unknown export %.80q", ErrNegotiation, name)
	}
	b := make([]byte, 10, 134)
	binary.BigEndian.PutUint64(b, uint64(n.size))
	binary.BigEndian.PutUint16(b[8:], n.flags)
	if !noZeroes {
		b = b[:134]
	}
	_, err := n.rw.Write(b)
	return err
}

func (n *negotiator) list(data []byte) error {
	if len(data) != 0 {
		return n.reply(optList, repErrInvalid, nil)
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(len(n.name)))
	if err := n.reply(optList, repServer, append(b, n.name...)); err != nil {
		return err
	}
	return n.reply(optList, repAck, nil)
}

// cutName takes a name with its length before it off data.
func cutName(data []byte) (name string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	k := binary.BigEndian.Uint32(data)
	if uint64(k) > uint64(len(data)-4) {
		return "", nil, false
	}
	return string(data[4 : 4+k]), data[4+k:], true
}

func (n *negotiator) info(opt uint32, data []byte) (bool, error) {
	name, rest, ok := cutName(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return false, n.reply(opt, repErrInvalid, nil)
	}
	if !n.known(name) {
		return false, n.reply(opt, repErrUnknown, nil)
	}
	b := make([]byte, 12)
	binary.BigEndian.PutUint16(b, infoExport)
	binary.BigEndian.PutUint64(b[2:], uint64(n.size))
	binary.BigEndian.PutUint16(b[10:], n.flags)
	if err := n.reply(opt, repInfo, b); err != nil {
		return false, err
	}
	b = make([]byte, 14)
	binary.BigEndian.PutUint16(b, infoBlockSize)
	binary.BigEndian.PutUint32(b[2:], 1)
	binary.BigEndian.PutUint32(b[6:], BlockSize)
	binary.BigEndian.PutUint32(b[10:], maxPayload)
	if err := n.reply(opt, repInfo, b); err != nil {
		return false, err
	}
	return opt == optGo, n.reply(opt, repAck, nil)
}

func (n *negotiator) structuredReply(data []byte) error {
	if len(data) != 0 {
		return n.reply(optStructuredReply, repErrInvalid, nil)
	}
	n.agreed.structured = true
	return n.reply(optStructuredReply, repAck, nil)
}

// metaContext answers for the one context there is, base:allocation.
func (n *negotiator) metaContext(opt uint32, data []byte) error {
	name, rest, ok := cutName(data)
	if !ok || len(rest) < 4 || (opt == optSetMeta && !n.agreed.structured) {
		return n.reply(opt, repErrInvalid, nil)
	}
	if !n.known(name) {
		return n.reply(opt, repErrUnknown, nil)
	}
	count := binary.BigEndian.Uint32(rest)
	if count > maxContexts {
		return n.reply(opt, repErrTooBig, nil)
	}
	rest = rest[4:]
	match := count == 0 && opt == optListMeta
	for range count {
		var q string
		if q, rest, ok = cutName(rest); !ok {
			return n.reply(opt, repErrInvalid, nil)
		}
		match = match || q == metaContextName || (opt == optListMeta && q == "base:")
	}
	if len(rest) != 0 {
		return n.reply(opt, repErrInvalid, nil)
	}
	if opt == optSetMeta {
		n.agreed.allocation = match
	}
	if match {
		b := binary.BigEndian.AppendUint32(nil, metaContextID)
		if err := n.reply(opt, repMetaContext, append(b, metaContextName...)); err != nil {
			return err
		}
	}
	return n.reply(opt, repAck, nil)
}
