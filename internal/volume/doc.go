// Package volume is a machine's disk: read-only layers, one writable overlay over them, and the NBD server through
// which QEMU reads and writes the whole.
//
// # The idea
//
// A layer is one sparse file. Every 4 KiB block of the disk has its fixed place in it, at data_offset + offset on
// the disk, and a map says of each block whether this layer holds it, holds it as zeros, or leaves it to the layer
// below. Nothing is ever allocated, so nothing can be fragmented by vigia, a run of blocks on the disk is a run in
// the file, and a megabyte is read or written by one system call. The host's file system does what it is good at:
// finding room for the blocks of a sparse file.
//
//	overlay    . . D . Z . . D      writable: D data, Z zeros, . look below
//	layer 2    . D D . . . . .      frozen
//	layer 1    D D . D D . . .      frozen
//	the disk   1 2 o 1 0 0 0 o
//
// An open volume holds the answer of the whole chain in one map in memory, a byte for each block, so twenty layers
// cost a read what one does. Two megabytes that come from one layer cost four bytes of it.
//
// # What survives
//
// What the guest flushed survives a kill of any process and a power cut. Flush writes in this order, each step
// waiting for the one before: data, sync, a record of the changed parts of the map, sync. A record is checked by
// CRC-32C and never rewrites a block that holds another; a full log is folded into the other one of two maps, and the
// switch is one header write. The whole of it, byte by byte, is in doc/volume-format.md, and Check reads a file by
// that document alone.
//
// # Who calls
//
// A confined guard holds the descriptors and opens nothing by path, so every file comes in as an *os.File.
//
//	v, err := volume.Open(layers, overlay, volume.Options{Observer: mapper, OnStall: pause})
//	err = volume.Serve(ctx, listener, v, volume.ServeOptions{})
//	...
//	next, err := v.Prepare(newFile)    // a fresh overlay, formatted by Create
//	id, done, err := v.Swap(next)      // takes the writes; the old one becomes a layer
//	err = <-done                       // which is now safe on the disk
//
// Freeze and Push do the same in two steps with nothing in between: for a machine that is off.
//
// # Sources
//
// The NBD protocol: doc/proto.md of the NetworkBlockDevice project. What fsync promises: fsync(2), fallocate(2), and
// the kernel's Documentation/filesystems. CRC-32C: RFC 3720.
package volume
