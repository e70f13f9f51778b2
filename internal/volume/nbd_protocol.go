package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// The NBD protocol's numbers, from doc/proto.md of the NetworkBlockDevice project.
const (
	nbdMagic       = 0x4e42444d41474943 // "NBDMAGIC"
	optMagic       = 0x49484156454f5054 // "IHAVEOPT"
	optReplyMagic  = 0x3e889045565a9
	requestMagic   = 0x25609513
	simpleMagic    = 0x67446698
	structureMagic = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10

	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4
	repErrUnsup    = 1<<31 | 1
	repErrInvalid  = 1<<31 | 3
	repErrUnknown  = 1<<31 | 6
	repErrTooBig   = 1<<31 | 9

	infoExport    = 0
	infoBlockSize = 3

	txHasFlags    = 1 << 0
	txReadOnly    = 1 << 1
	txFlush       = 1 << 2
	txFUA         = 1 << 3
	txTrim        = 1 << 5
	txWriteZeroes = 1 << 6
	txDF          = 1 << 7
	txMultiConn   = 1 << 8
	txFastZero    = 1 << 11

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4

	chunkFlagDone    = 1
	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 | 1

	requestSize     = 28
	simpleSize      = 16
	structuredSize  = 20
	dataChunkSize   = structuredSize + 8
	holeChunkSize   = structuredSize + 12
	statusHole      = 1
	statusZero      = 2
	metaContextID   = 1
	metaContextName = "base:allocation"
)

// Limits on what a client may ask for.
const (
	maxPayload     = 32 << 20 // of one READ or WRITE, the protocol's own default
	maxOption      = 8 << 10  // bytes of one option: names are at most 4096
	maxOptions     = 64       // options in one negotiation
	maxContexts    = 32       // queries in one LIST or SET_META_CONTEXT
	maxExtents     = 4096     // in one BLOCK_STATUS reply
	maxInFlight    = 16       // requests of one connection that wait for the host's disk
	pieceSize      = 256 << 10
	sendfileMin    = 64 << 10 // bytes from which sendfile is cheaper than a copy
	socketBuffer   = 4 << 20
	readBufferSize = pieceSize + 2*BlockSize
)

// Errors for which a connection is dropped: the client broke the protocol and cannot be answered any more.
var (
	ErrNegotiation = errors.New("nbd: client broke the negotiation")
	ErrRequest     = errors.New("nbd: client sent a malformed request")
)

// request is a decoded transmission request; a WRITE's payload follows it.
type request struct {
	flags, command uint16
	cookie         uint64
	off            uint64
	n              uint32
}

func decodeRequest(b []byte) (request, error) {
	be := binary.BigEndian
	if m := be.Uint32(b); m != requestMagic {
		return request{}, fmt.Errorf("%w: magic %#x", ErrRequest, m)
	}
	r := request{be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint64(b[8:]), be.Uint64(b[16:]), be.Uint32(b[24:])}
	if r.command == cmdWrite && r.n > maxPayload {
		return request{}, fmt.Errorf("%w: write of %d bytes, at most %d", ErrRequest, r.n, maxPayload)
	}
	return r, nil
}

// nbdErrno is the protocol's number for an error.
func nbdErrno(err error) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ErrReadOnly):
		return 1 // EPERM
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return 28
	case errors.Is(err, errBadRequest), errors.Is(err, ErrRange):
		return 22 // EINVAL
	case errors.Is(err, errUnsupported):
		return 95 // ENOTSUP
	case errors.Is(err, ErrClosed):
		return 108 // ESHUTDOWN
	}
	return 5 // EIO
}

var (
	errBadRequest  = errors.New("nbd: bad request")
	errUnsupported = errors.New("nbd: not supported")
)

// putSimple and putChunk write reply headers.
func putSimple(b []byte, cookie uint64, errno uint32) {
	binary.BigEndian.PutUint32(b, simpleMagic)
	binary.BigEndian.PutUint32(b[4:], errno)
	binary.BigEndian.PutUint64(b[8:], cookie)
}

func putChunk(b []byte, flags, kind uint16, cookie uint64, n int) {
	binary.BigEndian.PutUint32(b, structureMagic)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint32(b[16:], uint32(n))
}
