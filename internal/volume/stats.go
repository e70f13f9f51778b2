package volume

import "sync/atomic"

type counters struct {
	reads, readBytes, writes, writtenBytes  atomic.Int64
	trims, zeroes                           atomic.Int64
	flushes, records, checkpoints, slowRead atomic.Int64
}

// Stats are counts since the volume was opened.
type Stats struct {
	Reads, ReadBytes     int64
	Writes, WrittenBytes int64
	Trims, Zeroes        int64
	Flushes              int64 // that had something to make durable
	Records, Checkpoints int64 // of the map: log records, and foldings of the log
	SlowReads            int64 // that the host's page cache could not answer
	Layers               int
	MapBytes             int64 // memory that the map takes
}

// Stats counts what was done.
func (v *Volume) Stats() Stats {
	c := &v.stats
	v.mapMu.RLock()
	defer v.mapMu.RUnlock()
	return Stats{
		Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(),
		Writes: c.writes.Load(), WrittenBytes: c.writtenBytes.Load(),
		Trims: c.trims.Load(), Zeroes: c.zeroes.Load(),
		Flushes: c.flushes.Load(), Records: c.records.Load(), Checkpoints: c.checkpoints.Load(),
		SlowReads: c.slowRead.Load(), Layers: len(v.chain), MapBytes: v.m.bytes(),
	}
}
