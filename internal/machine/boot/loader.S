# The loader of package boot: 1,024 bytes in real mode, at 0x10000, entered at 0x10200 by QEMU's option ROM as the kernel it was given,
# and 512 bytes that are nothing. By the boot protocol of x86 Linux (Documentation/arch/x86/boot.rst), version 2.08: the last one
# without the list of setup data, of which QEMU 7.2 would put a piece behind the kernel that is not there.
#
# The first of what QEMU takes for the initrd is the kernel. Its protected-mode part goes to 1 MiB, its real-mode part takes this one's
# place, with what QEMU and the firmware wrote into this one's header; the rest is the initrd, and stays where it is.
#
# Built by: as --32 loader.S -o l.o && ld -m elf_i386 -Ttext 0 --oformat binary l.o -o loader.bin; a test does, and compares.

	.code16
	.text
	.globl _start
_start:
	.org 0x1f1
	.byte 1				# setup_sects, beside the first
	.word 0
	.long 32			# syssize: 512 bytes of 16
	.word 0
	.word 0
	.word 0
	.org 0x1fe
	.word 0xaa55			# boot_flag
	.org 0x200
	jmp	begin
	.ascii "HdrS"
	.word 0x0208			# version
	.long 0
	.word 0
	.word 0
	.byte 0				# 0x210 type_of_loader: QEMU's
	.byte 1				# 0x211 loadflags: LOADED_HIGH
	.word 0
	.long 0x100000			# code32_start
	.long 0				# 0x218 ramdisk_image: QEMU's
	.long 0				# 0x21c ramdisk_size: QEMU's
	.long 0
	.word 0				# 0x224 heap_end_ptr: QEMU's
	.word 0
	.long 0				# 0x228 cmd_line_ptr: QEMU's
	.long 0x7fffffff		# 0x22c initrd_addr_max
	.long 0x1000000			# kernel_alignment
	.byte 1, 0
	.word 0
	.long 2047			# cmdline_size
	.org 0x268
begin:
	cli
	cld
	movw	$0x4000, %ax		# out of the way: to 0x40000, where nothing is
	movw	%ax, %es
	xorw	%si, %si
	xorw	%di, %di
	movw	$256, %cx
	rep movsl
	ljmp	$0x4000, $moved
moved:
	movw	%ax, %ds
	lgdtl	gdtr			# es and fs learn in protected mode that they reach 4 GiB, and keep it
	movl	%cr0, %eax
	incw	%ax
	movl	%eax, %cr0
	movw	$8, %bx
	movw	%bx, %es
	movw	%bx, %fs
	decw	%ax
	movl	%eax, %cr0
	xorw	%ax, %ax
	movw	%ax, %es
	movw	%ax, %fs
	movl	0x218, %ebx		# the kernel
	movzbl	%fs:0x1f1(%ebx), %ebp	# its real-mode part, in sectors but for the first; 0 means 4
	testl	%ebp, %ebp
	jnz	1f
	movb	$4, %al
	movzbl	%al, %ebp
1:	incl	%ebp
	shll	$9, %ebp
	leal	(%ebx,%ebp), %esi
	movl	size, %ecx
	subl	%ebp, %ecx
	addl	$3, %ecx
	shrl	$2, %ecx
	movl	$0x100000, %edi
	rep addr32 movsl %fs:(%esi), %es:(%edi)
	movl	%ebx, %esi
	movl	%ebp, %ecx
	shrl	$2, %ecx
	movl	$0x10000, %edi
	rep addr32 movsl %fs:(%esi), %es:(%edi)
	movw	$0x1000, %ax
	movw	%ax, %es
	movb	0x210, %al
	movb	%al, %es:0x210
	orb	$0x80, %es:0x211	# CAN_USE_HEAP
	movw	0x224, %ax
	movw	%ax, %es:0x224
	movl	0x228, %eax
	movl	%eax, %es:0x228
	movl	padded, %eax
	movl	0x21c, %ecx
	subl	%eax, %ecx
	movl	%ecx, %es:0x21c
	addl	%ebx, %eax
	testl	%ecx, %ecx
	jnz	2f
	xorl	%eax, %eax
2:	movl	%eax, %es:0x218
	movw	$0x1000, %ax		# as the protocol wants it; the stack is as it was
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %fs
	movw	%ax, %gs
	ljmp	$0x1020, $0
	.balign 8
gdt:	.quad 0
	.quad 0x00cf92000000ffff	# data, from 0, 4 GiB
gdtr:	.word 15
	.long 0x40000+gdt-_start
	.org 0x3f8
size:	.long 0				# of the kernel
padded:	.long 0				# where the initrd begins behind it
	.org 0x600
