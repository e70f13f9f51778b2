// Package ext4 understands ext2, ext3 and ext4 file systems from below: from the bytes of the disk alone, without
// mounting anything, while the guest that owns the disk may be hostile and may be running.
//
// It does two jobs.
//
//   - [Open] gives a small read-only reader ([FS]): paths, directories, symbolic links, files, with every size capped.
//     A dirty journal is replayed in memory, as an overlay of blocks; the disk is never written.
//   - [NewTracker] builds an index from disk block to inode and keeps it current by following the guest's own disk
//     requests ([Tracker]), so that a request for sector 12345 can be named "a read of /etc/shadow".
//
// [Find] comes before both: it tells which file systems a disk holds, and where.
//
// # How the index stays current
//
// ext4 changes its metadata through a journal (jbd2): the changed blocks are first written to the journal, then a
// commit block, and only later to their places. Every one of these writes passes the disk server. When a commit block
// passes, the tracker walks the transaction's descriptor blocks, compares each inode-table block, extent-tree block and
// directory block with what it was before, and changes the index by the difference:
//
//	inode 812: extents [900,+2) → [900,+2) [7000,+8)     blocks 7000-7007 now belong to inode 812
//	directory 77: "shadow" 812 → 815, "shadow+" gone     /etc/shadow is now inode 815, renamed from shadow+
//
// The blocks of a transaction that were not yet written to their places are remembered by their position in the
// journal (not by their contents), so the tracker's view of the disk is always the one of the last commit.
//
// A file's data are written before the commit that says whose they are ("ordered" mode). Such writes are held as bits
// of an unowned block, and reported at the commit as pending.
//
// Names are not kept: the index holds the number of each inode's parent directory, and a path is made by reading the
// directories when somebody asks. A moved directory therefore costs one entry. Only watched files have their paths
// at hand.
//
// What does not fit (a metadata block that changes outside the journal, a broken checksum, a torn transaction, a file
// system that grew) makes the index stale and starts a rebuild from the disk; see [Stats].
//
// # Sources
//
// The layout is that of Documentation/filesystems/ext4/ and include/uapi, fs/ext4/ext4.h, fs/ext4/ext4_extents.h,
// fs/ext4/fast_commit.h, include/linux/jbd2.h of the Linux kernel; doc/ext4.md says which parts are read and how.
package ext4
