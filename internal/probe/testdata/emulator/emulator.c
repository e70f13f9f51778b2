/*
 * The plugin in an emulator that is none: memory is a file (descriptor 4) of which the first half lies at KERNEL and the second at USER, and
 * one instruction is executed as often as the first argument says. Descriptor 3 is the page.
 */
#include "../../plugin/probe.c"
#include <stdio.h>
#include <sys/stat.h>

#define KERNEL 0xffff888000000000ull
#define USER 0x400000ull

static char *ram;
static uint64_t half;
static uint64_t at;
static exec_cb called;
static void *data;
static tb_trans_cb translate;

void *qemu_get_cpu(int index) { return index < 2 ? ram : NULL; }

int cpu_memory_rw_debug(void *cpu, uint64_t addr, void *buf, size_t len, bool write)
{
	uint64_t off = addr >> 63 ? addr - KERNEL : addr - USER;
	if (!cpu || write || off >= half || len > half - off)
		return -1;
	memcpy(buf, ram + (addr >> 63 ? 0 : half) + off, len);
	return 0;
}

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, tb_trans_cb cb) { (void)id; translate = cb; }
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb) { (void)tb; return 1; }
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t i) { (void)tb; (void)i; return NULL; }
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn) { (void)insn; return at; }
int vm_stop(int state) { return state; }

void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, exec_cb cb, int flags, void *userdata)
{
	(void)insn;
	(void)flags;
	called = cb;
	data = userdata;
}

int main(int argc, char **argv)
{
	char *args[] = { "fd=3" };
	struct stat st;
	if (argc < 2 || fstat(4, &st) < 0)
		return 2;
	ram = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, 4, 0);
	half = st.st_size / 2;
	if (ram == MAP_FAILED || qemu_plugin_install(1, NULL, 1, args) || !translate)
		return 2;
	at = orders->point[0] + ALIGN;
	translate(1, NULL);
	if (!called)
		return 2;
	uint64_t begin = now_us();
	long many = atol(argv[1]);
	for (long i = 0; i < many; i++)
		called(i & 1, data);
	printf("%.3f us each\n", (double)(now_us() - begin) / many);
	return 0;
}
