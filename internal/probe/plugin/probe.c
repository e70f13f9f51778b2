/*
 * vigia-probe: the part of vigia that runs inside QEMU, under software emulation (TCG) only.
 *
 * It tells the guard that a virtual CPU is about to execute one of a few instructions of the guest's kernel. Where the guard has left a
 * recipe for what it wants to know, that is copied out of the guest's memory into a ring, and the CPU goes on at once. Else, or
 * where the ring is full, the CPU is held until the guard has looked, for a bounded time. It decides nothing and understands
 * nothing of the guest, but for one filter: most files that a guest opens are of no interest.
 *
 * QEMU's plugin API has no packaged header: what is used of it is declared below. API 1 is QEMU 4.2 to 8.2, API 2 is
 * accepted by all from 9.0 on; the file is built once for each (PLUGIN_API). The emulator's own functions behind the filter are weak:
 * where an emulator does not export them, the filter says so and files are not probed.
 *
 * All that is shared with the guard is one mapping of SHARED_SIZE bytes, inherited as a descriptor, which stays open so that a later
 * daemon finds it: struct shared below, which
 * doc/probes.md describes and internal/probe/page.go has in Go. The guard writes struct orders, this file writes struct tidings, but for
 * the turns. Nothing here depends on the host's time but how long a silent guard is waited for: guest and recordings do not see it.
 *
 * Sources: docs/devel/tcg-plugins.rst; include/qemu/qemu-plugin.h; futex(2).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef PLUGIN_API
#define PLUGIN_API 1
#endif
#define EXPORT __attribute__((visibility("default")))

/* Of the plugin API. */
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info;
enum { CB_NO_REGS = 0 };
typedef void (*tb_trans_cb)(plugin_id, struct qemu_plugin_tb *);
typedef void (*exec_cb)(unsigned vcpu, void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, tb_trans_cb);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, exec_cb, int flags, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);

/* Of the emulator: what its own plugin API for reading memory is made of, in versions that have one. */
__attribute__((weak)) void *qemu_get_cpu(int index);
__attribute__((weak)) int cpu_memory_rw_debug(void *cpu, uint64_t addr, void *buf, size_t len, bool write);

/* Likewise: what a device of the emulator's calls on a virtual CPU's thread to have the machine paused (include/sysemu/runstate.h). */
enum { RUN_STATE_PAUSED = 4 };
__attribute__((weak)) int vm_stop(int state);

EXPORT int qemu_plugin_version = PLUGIN_API;

enum {
	HALF = 32768,
	RING = 1 << 20,
	SHARED_SIZE = 2 * HALF + RING,
	STEPS = 64,
	REGISTERS = 16,
	COPY_MAX = 16384,
	CLIMB_MAX = 64,
	PIECES = 512,
	POINTS = 64,
	CPUS = 64,
	NAMES = 128,
	NAME_MAX_LEN = 60,
	DEPTH = 24,
};

#define MAGIC 0x32626f7270676976ull /* "vigprob2" */

/* Where the kernel's image may lie, and what its place is a multiple of. */
#define IMAGE_BEGIN 0xffffffff80000000ull
#define IMAGE_END 0xffffffffc0000000ull
#define ALIGN 0x200000ull

enum how { EXACT, PREFIX, SUFFIX, ANY };

struct name {
	uint8_t len, how;
	char text[NAME_MAX_LEN + 2];
};

/* One of a recipe's, which internal/memory/copied.go describes. */
struct step {
	uint8_t op, base, dst, when;
	uint32_t at, len, pad;
};
enum { END, COPY, LOAD, CLIMB, TEXT };
enum { ALWAYS, OPENING };

struct orders {
	_Atomic uint64_t magic;      /* written last */
	uint32_t points;             /* how many of point[] are used: fixed before QEMU starts */
	_Atomic uint32_t reader;     /* number of the guard that reads; 0: none */
	_Atomic uint64_t enabled;    /* by point */
	_Atomic uint64_t filtered;   /* by point: opens, which the filter must let pass */
	_Atomic uint64_t traced;     /* by point: only in the traced process */
	_Atomic uint64_t slide;      /* of the kernel; SLIDE_UNKNOWN: take the guess */
	uint64_t start;              /* link address of start_kernel */
	uint32_t patience;           /* microseconds that an answer is waited for */
	uint32_t spin;               /* rounds before that */
	_Atomic uint32_t names;      /* of the filter; changed only while its points are not enabled */
	_Atomic uint32_t tgid;       /* of the traced process; 0: all */
	uint32_t nameidata, dentry;  /* offsets: task.nameidata, nameidata.path.dentry */
	uint32_t parent, name, len;  /* offsets: dentry.d_parent, .d_name.name, .d_name.len */
	uint32_t tgid_at;            /* offset: task.tgid */
	uint64_t point[POINTS];      /* link addresses */
	uint64_t current[CPUS];      /* run-time address of each CPU's pointer to its task */
	struct name filter[NAMES];
	_Atomic uint64_t copied;     /* by point: the recipe has all that the guard wants to know */
	_Atomic uint64_t tail;       /* of the ring: what comes before was read */
	uint32_t mount, above;       /* offsets: mount.mnt, .mnt_parent */
	uint32_t mountpoint, root;   /* offsets: mount.mnt_mountpoint, vfsmount.mnt_root */
	struct step recipe[STEPS];
	_Atomic uint32_t pause;      /* number of the hit << 2 at which the machine is to be paused; 0: none */
};
#define SLIDE_UNKNOWN UINT64_MAX

/* One virtual CPU's. */
struct slot {
	_Atomic uint32_t turn; /* number of the hit << 2, and whose turn it is */
	uint32_t point;
	_Atomic uint64_t lost; /* hits that nobody looked at */
	uint64_t reserved[6];
};

/* Whose turn it is. The guard turns HELD into SEEN, this file HELD into GONE: who comes second learns that he did. */
enum { IDLE, HELD, SEEN, GONE };
enum { AWAKE, SOUND, DOZE };

struct tidings {
	_Atomic uint64_t magic;   /* the points were taken */
	uint32_t api;
	uint32_t reads;           /* the filter can read memory */
	_Atomic uint64_t guess;   /* the slide by where start_kernel ran last */
	_Atomic uint32_t bell;    /* changes with each hit, and wakes the guard */
	_Atomic uint32_t asleep;  /* the guard waits for the bell: SOUND for any, DOZE for what is urgent */
	_Atomic uint32_t silent;  /* the number of a guard that did not answer in time */
	_Atomic uint32_t urgent;  /* the ring is more than half full */
	_Atomic uint64_t head;    /* of the ring: where the next copy begins */
	uint32_t pauses;          /* a guard can have the machine paused at a hit */
	uint32_t pad[3];
	struct slot slot[CPUS];
};

/* What begins a copy in the ring. At the end of the ring, where one does not fit, SKIP says to go on at its beginning. */
struct copy {
	uint32_t size; /* with this head */
	uint16_t point, cpu;
	uint64_t task;
};
#define SKIP 0xffff

/* And a piece of guest memory in it; its bytes follow, up to a multiple of 8. */
struct piece {
	uint64_t va;
	uint32_t len, pad;
};

struct shared {
	union { struct orders orders; char a[HALF]; };
	union { struct tidings tidings; char b[HALF]; };
	char ring[RING];
};
_Static_assert(sizeof(struct shared) == SHARED_SIZE, "the two halves fit");
_Static_assert(offsetof(struct tidings, slot) == 64 && offsetof(struct orders, pause) == 10368, "as internal/probe/page.go has it");
_Static_assert(sizeof(struct slot) == 64, "one cache line each");

static struct orders *orders;
static struct tidings *tidings;
static char *ring;
static pthread_mutex_t ring_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t points;
static uint64_t point[POINTS];
static uint64_t low[4096 / 64]; /* which low 12 bits the points have */

static void futex_wake(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* Waits until the guard has looked; false where it did not in time. */
static bool seen(struct slot *s, uint32_t held)
{
	uint32_t spin = orders->spin < 20000 ? orders->spin : 20000;
	for (uint32_t i = 0; i < spin; i++) {
		if (atomic_load(&s->turn) != held)
			return true;
		__builtin_ia32_pause();
	}
	uint64_t patience = orders->patience < 2000000 ? orders->patience : 2000000;
	uint64_t end = now_us() + patience;
	for (;;) {
		if (atomic_load(&s->turn) != held)
			return true;
		uint64_t now = now_us();
		if (now >= end)
			return !atomic_compare_exchange_strong(&s->turn, &held, (held & ~3u) | GONE);
		struct timespec left = { (time_t)((end - now) / 1000000), (long)((end - now) % 1000000 * 1000) };
		syscall(SYS_futex, &s->turn, FUTEX_WAIT, held, &left, NULL, 0);
	}
}

static bool peek(unsigned vcpu, uint64_t addr, void *buf, size_t len)
{
	void *cpu = qemu_get_cpu((int)vcpu);
	return cpu && addr >> 63 && cpu_memory_rw_debug(cpu, addr, buf, len, false) == 0;
}

static bool fits(const char *text, uint32_t len)
{
	uint32_t n = atomic_load(&orders->names);
	for (uint32_t i = 0; i < n && i < NAMES; i++) {
		const struct name *f = &orders->filter[i];
		uint32_t want = f->len;
		if (f->how == ANY)
			return true;
		if (want > len || want > NAME_MAX_LEN || (f->how == EXACT && want != len))
			continue;
		if (memcmp(f->how == SUFFIX ? text + len - want : text, f->text, want) == 0)
			return true;
	}
	return false;
}

/* Whether the file that the current task is opening, or a directory above it, has a name that is looked for. */
static bool wanted(unsigned vcpu, uint64_t task)
{
	uint64_t dentry;
	char d[128], text[256];
	if (orders->parent > sizeof d - 8 || orders->name > sizeof d - 8 || orders->len > sizeof d - 4)
		return false;
	if (!peek(vcpu, task + orders->nameidata, &dentry, 8) || !dentry || !peek(vcpu, dentry + orders->dentry, &dentry, 8))
		return false;
	for (int i = 0; i < DEPTH; i++) {
		uint64_t parent, name;
		uint32_t len;
		if (!peek(vcpu, dentry, d, sizeof d))
			return false;
		memcpy(&parent, d + orders->parent, 8);
		memcpy(&name, d + orders->name, 8);
		memcpy(&len, d + orders->len, 4);
		if (parent == dentry)
			return false;
		if (len < sizeof text && name - dentry < sizeof d && name - dentry + len <= sizeof d) {
			if (fits(d + (name - dentry), len))
				return true;
		} else if (len < sizeof text && peek(vcpu, name, text, len) && fits(text, len)) {
			return true;
		}
		dentry = parent;
	}
	return true; /* deeper than is looked for: the guard decides */
}

static bool passes(unsigned vcpu, uint32_t i)
{
	bool filtered = atomic_load(&orders->filtered) >> i & 1, traced = atomic_load(&orders->traced) >> i & 1;
	uint32_t tgid = atomic_load(&orders->tgid), have;
	if (!filtered && (!traced || !tgid))
		return true;
	uint64_t task;
	if (!tidings->reads || !peek(vcpu, orders->current[vcpu], &task, 8))
		return false;
	if (filtered)
		return wanted(vcpu, task);
	return peek(vcpu, task + orders->tgid_at, &have, 4) && have == tgid;
}

/* A copy in the making. */
struct making {
	void *cpu;
	uint32_t used, pieces;
	bool full;
	uint16_t piece[PIECES]; /* where each begins */
	_Alignas(8) char b[COPY_MAX];
};

/* The bytes at va, if they were copied already: mostly just before. */
static char *had(struct making *m, uint64_t va, uint32_t len)
{
	struct piece p;
	for (uint32_t i = m->pieces; i-- > 0;) {
		memcpy(&p, m->b + m->piece[i], sizeof p);
		if (va - p.va < p.len && len <= p.len - (va - p.va))
			return m->b + m->piece[i] + sizeof p + (va - p.va);
	}
	return NULL;
}

static char *take(struct making *m, uint64_t va, uint32_t len)
{
	char *b = had(m, va, len);
	if (b || !len)
		return b;
	uint32_t room = (len + 7) & ~7u;
	if (len > COPY_MAX || m->used + sizeof(struct piece) + room > COPY_MAX || m->pieces == PIECES) {
		m->full = true;
		return NULL;
	}
	struct piece p = { va, len, 0 };
	b = m->b + m->used + sizeof p;
	if (cpu_memory_rw_debug(m->cpu, va, b, len, false) != 0)
		return NULL;
	memcpy(m->b + m->used, &p, sizeof p);
	memset(b + len, 0, room - len);
	m->piece[m->pieces++] = m->used;
	m->used += sizeof p + room;
	return b;
}

static uint64_t word(struct making *m, uint64_t va)
{
	uint64_t v = 0;
	char *b = take(m, va, 8);
	if (b)
		memcpy(&v, b, 8);
	return v;
}

/* The names from a dentry up to the root of all mounts. */
static void climb(struct making *m, uint64_t mnt, uint64_t dentry)
{
	uint64_t below = orders->mount, last = 0, root = 0;
	for (int i = 0; i < CLIMB_MAX && mnt && dentry; i++) {
		if (mnt != last)
			root = word(m, mnt + orders->root);
		last = mnt;
		if (dentry == root) {
			uint64_t mount = mnt - below, above = word(m, mount + orders->above);
			if (!above || above == mount)
				return;
			dentry = word(m, mount + orders->mountpoint);
			mnt = above + below;
			continue;
		}
		take(m, dentry, 128); /* all that is asked for below, mostly */
		uint64_t parent = word(m, dentry + orders->parent), name = word(m, dentry + orders->name);
		uint32_t len = 0;
		char *b = take(m, dentry + orders->len, 4);
		if (b)
			memcpy(&len, b, 4);
		take(m, name, len < 256 ? len : 255);
		if (!parent || parent == dentry)
			return;
		dentry = parent;
	}
}

/* User memory, as far as it is there: a page at a time. */
static uint32_t pages(struct making *m, uint64_t from, uint64_t to, uint32_t most, char *last)
{
	uint32_t done = 0;
	while (from < to && done < most) {
		uint64_t n = 4096 - (from & 4095);
		n = n < to - from ? n : to - from;
		n = n < most - done ? n : most - done;
		char *b = from >> 63 ? NULL : take(m, from, n);
		if (!b)
			break;
		*last = b[n - 1];
		from += n;
		done += n;
	}
	return done;
}

/* A text from one address to another; without a NUL at its end it goes on. */
static void text(struct making *m, uint64_t from, uint64_t to, uint64_t on, uint32_t most)
{
	char last = 0;
	uint32_t n = pages(m, from, to, most, &last);
	if (n && n == to - from && last)
		pages(m, to, on, most - n, &last);
}

/* Copies what the recipe says, and gives it to the guard. False where there is no room. */
static bool copied(unsigned vcpu, uint32_t i)
{
	struct making m;
	struct copy head = { 0, i, vcpu, 0 };
	uint64_t reg[REGISTERS] = { 0 }, opening = atomic_load(&orders->filtered) >> i & 1;
	m.cpu = qemu_get_cpu((int)vcpu);
	m.used = sizeof head;
	m.pieces = 0;
	m.full = false;
	if (!m.cpu || cpu_memory_rw_debug(m.cpu, orders->current[vcpu], &head.task, 8, false) != 0)
		return false;
	reg[0] = head.task;
	for (const struct step *s = orders->recipe; s < orders->recipe + STEPS && s->op != END && !m.full; s++) {
		uint64_t base = reg[s->base % REGISTERS], *dst = &reg[s->dst % REGISTERS];
		if (!base || (s->when == OPENING && !opening))
			continue;
		switch (s->op) {
		case COPY:
			take(&m, base + s->at, s->len);
			break;
		case LOAD:
			*dst = word(&m, base + s->at);
			break;
		case CLIMB:
			climb(&m, base, *dst);
			break;
		case TEXT:
			text(&m, base, *dst, reg[s->at % REGISTERS], s->len);
			break;
		}
	}
	if (m.full)
		return false;
	head.size = m.used;
	memcpy(m.b, &head, sizeof head);
	pthread_mutex_lock(&ring_lock);
	uint64_t at = atomic_load(&tidings->head), tail = atomic_load(&orders->tail);
	uint32_t left = RING - at % RING, skip = left < m.used ? left : 0;
	bool fits = at - tail + skip + m.used <= RING;
	if (fits) {
		if (skip) {
			struct copy end = { left, SKIP, 0, 0 };
			memcpy(ring + at % RING, &end, left < sizeof end ? 8 : sizeof end);
			at += skip;
		}
		memcpy(ring + at % RING, m.b, m.used);
		atomic_store(&tidings->head, at + m.used);
	}
	atomic_store(&tidings->urgent, at + m.used - tail > RING / 2);
	pthread_mutex_unlock(&ring_lock);
	return fits;
}

/* A virtual CPU is about to execute a point. data: its number, and its slide in units of ALIGN. */
static void hit(unsigned vcpu, void *data)
{
	uint32_t i = (uintptr_t)data & 0xff;
	uint64_t slide = ((uintptr_t)data >> 8) * ALIGN;
	uint64_t want = atomic_load(&orders->slide);
	if (want == SLIDE_UNKNOWN)
		want = atomic_load(&tidings->guess);
	if (slide != want || vcpu >= CPUS || !(atomic_load(&orders->enabled) >> i & 1))
		return;
	uint32_t reader = atomic_load(&orders->reader);
	if (!reader || !passes(vcpu, i))
		return;
	struct slot *s = &tidings->slot[vcpu];
	if (tidings->reads && atomic_load(&orders->copied) >> i & 1 && copied(vcpu, i)) {
		if (atomic_load(&tidings->asleep) == SOUND || (atomic_load(&tidings->asleep) && atomic_load(&tidings->urgent))) {
			atomic_fetch_add(&tidings->bell, 1);
			futex_wake(&tidings->bell);
		}
		return;
	}
	if (reader == atomic_load(&tidings->silent)) {
		atomic_fetch_add(&s->lost, 1);
		return;
	}
	uint32_t held = ((atomic_load(&s->turn) & ~3u) + 4) | HELD;
	s->point = i;
	atomic_store(&s->turn, held);
	atomic_fetch_add(&tidings->bell, 1);
	if (atomic_load(&tidings->asleep))
		futex_wake(&tidings->bell);
	if (!seen(s, held)) {
		atomic_store(&tidings->silent, reader);
		atomic_fetch_add(&s->lost, 1);
	} else if (atomic_load(&orders->pause) == (held & ~3u) && tidings->pauses) {
		vm_stop(RUN_STATE_PAUSED); /* before the next block of instructions */
	}
}

/*
 * Takes the points, once. The guard starts beside the emulator and may write them later than this is loaded, but before the guest's first
 * instruction is executed, and so translated.
 */
static bool taken(void)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static _Atomic bool done;
	if (atomic_load(&done))
		return true;
	if (atomic_load(&orders->magic) != MAGIC || orders->points > POINTS)
		return false;
	pthread_mutex_lock(&lock);
	if (!atomic_load(&done)) {
		points = orders->points <= POINTS ? orders->points : 0;
		for (uint32_t i = 0; i < points; i++) {
			point[i] = orders->point[i];
			low[(point[i] & 4095) / 64] |= 1ull << (point[i] & 63);
		}
		atomic_store(&tidings->magic, MAGIC);
		atomic_store(&done, true);
	}
	pthread_mutex_unlock(&lock);
	return true;
}

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
	(void)id;
	if (!taken())
		return;
	size_t n = qemu_plugin_tb_n_insns(tb);
	for (size_t k = 0; k < n; k++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, k);
		uint64_t addr = qemu_plugin_insn_vaddr(insn);
		if (addr < IMAGE_BEGIN || addr >= IMAGE_END)
			return; /* a block lies within two pages at most */
		if (k == 0 && addr >= orders->start && (addr - orders->start) % ALIGN == 0)
			atomic_store(&tidings->guess, addr - orders->start);
		if (!(low[(addr & 4095) / 64] >> (addr & 63) & 1))
			continue;
		for (uint32_t i = 0; i < points; i++) {
			uint64_t slide = addr - point[i];
			if (addr >= point[i] && slide % ALIGN == 0)
				qemu_plugin_register_vcpu_insn_exec_cb(insn, hit, CB_NO_REGS, (void *)(uintptr_t)(slide / ALIGN << 8 | i));
		}
	}
}

EXPORT int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int argc, char **argv)
{
	(void)info;
	int fd = -1;
	for (int i = 0; i < argc; i++)
		if (strncmp(argv[i], "fd=", 3) == 0)
			fd = atoi(argv[i] + 3);
	if (fd < 0)
		return 0; /* only tried */
	struct shared *s = mmap(NULL, SHARED_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (s == MAP_FAILED)
		return -1;
	orders = &s->orders;
	tidings = &s->tidings;
	ring = s->ring;
	tidings->api = PLUGIN_API;
	tidings->reads = qemu_get_cpu && cpu_memory_rw_debug;
	tidings->pauses = vm_stop != NULL;
	atomic_store(&tidings->guess, SLIDE_UNKNOWN);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
