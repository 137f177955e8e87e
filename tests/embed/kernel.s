# A kernel of 4-level long mode for tests: demand paging, copy-on-write, edits of its own tables, a user program. It keeps to
# instructions that a KVM whose guests' kernel mode is emulated knows: it returns to user code by SYSEXIT, which costs RCX and RDX,
# and to kernel code by a jump.
#
#   as --64 kernel.s -o kernel.o && objcopy -O binary -j .text kernel.o kernel.bin         # loaded at 0x8000
#
# Linear addresses below 2 MiB are guest-physical ones. RAX is the number of a system call (UD2), R15 where to go on after a fault
# that the kernel does not mend.
        .intel_syntax noprefix
        .code64
        .text

        .set BASE, 0x8000
        .set LOG, 0xC000                # count, then vector, CR2, error code, RIP from 32 on
        .set VARS, 0xD000               # next free frame; from 0x200 on what the user program reports
        .set SHARED, 0xE000
        .set HEAP, 0x40000000           # 64 pages, on demand; the upper 32 cannot be executed
        .set COW, 0x80000000            # 4 pages, of SHARED until they are written to
        .set USER, 0x28
        .set PAGE, 4096

start:
        mov     ecx, 0x174              # IA32_SYSENTER_CS
        mov     eax, 8
        xor     edx, edx
        wrmsr
        mov     rdi, SHARED
        mov     rax, 0x1111111111111111
1:      mov     [rdi], rax
        add     rax, 7
        add     rdi, 8
        test    edi, 0xFFF
        jnz     1b
        mov     edi, COW
2:      mov     esi, SHARED + 5
        call    map_page
        add     rdi, PAGE
        cmp     edi, COW + 4 * PAGE
        jne     2b
        mov     eax, HEAP + 0x1F008     # the kernel's own demand paging
        mov     qword ptr [rax], 0x5A
        mov     eax, COW + 3 * PAGE + 16        # and copy-on-write: CR0.WP is set
        add     qword ptr [rax], 1
        mov     edx, BASE + (user - start)
        mov     ecx, HEAP + 0x10000
        .byte   0x48, 0x0F, 0x35        # SYSEXIT to 64-bit code

# ---- tables ---------------------------------------------------------------------------------------------------------------

# RDI linear address; returns RAX, the address of its leaf entry. Makes the tables that are missing. Uses RBX, RCX.
find_entry:
        mov     rax, cr3
        .irp    shift, 39, 30, 21
        and     rax, -4096
        mov     rcx, rdi
        shr     rcx, \shift
        and     ecx, 511
        lea     rax, [rax + rcx * 8]
        mov     rbx, [rax]
        test    bl, 1
        jnz     9f
        call    allocate
        or      rbx, 7
        mov     [rax], rbx
9:      mov     rax, rbx
        .endr
        and     rax, -4096
        mov     rcx, rdi
        shr     rcx, 12
        and     ecx, 511
        lea     rax, [rax + rcx * 8]
        ret

# RDI linear address, RSI entry
map_page:
        call    find_entry
        mov     [rax], rsi
        invlpg  [rdi]
        ret

# Returns RBX, a frame of zeros. Uses RCX.
allocate:
        mov     rbx, [VARS]
        lea     rcx, [rbx + PAGE]
        mov     [VARS], rcx
1:      sub     rcx, 8
        mov     qword ptr [rcx], 0
        cmp     rcx, rbx
        jne     1b
        ret

# ---- exceptions -----------------------------------------------------------------------------------------------------------

# On the stack after this: RDI RSI RDX RCX RBX RAX, error code, RIP, CS, RFLAGS, RSP, SS
        .macro  save
        push    rax
        push    rbx
        push    rcx
        push    rdx
        push    rsi
        push    rdi
        .endm
        .set AT_ERROR, 48
        .set AT_RIP, 56
        .set AT_CS, 64
        .set AT_RSP, 80

# EDX vector, RSI address
log_fault:
        mov     rax, [LOG]
        mov     rcx, rax
        shl     rcx, 5
        mov     [LOG + 32 + rcx], rdx
        mov     [LOG + 40 + rcx], rsi
        mov     rbx, [rsp + 8 + AT_ERROR]
        mov     [LOG + 48 + rcx], rbx
        mov     rbx, [rsp + 8 + AT_RIP]
        mov     [LOG + 56 + rcx], rbx
        add     rax, 1
        mov     [LOG], rax
        ret

page_fault:
        save
        mov     rsi, cr2
        mov     edx, 14
        call    log_fault
        mov     rdi, cr2
        and     rdi, -4096
        mov     rdx, [rsp + AT_ERROR]
        mov     rax, rdi
        sub     rax, HEAP
        cmp     rax, 64 * PAGE
        jae     1f
        test    dl, 1
        jnz     give_up
        call    allocate
        lea     rsi, [rbx + 7]
        cmp     rdi, HEAP + 32 * PAGE
        jb      2f
        mov     rax, 0x8000000000000000
        or      rsi, rax
2:      call    map_page
        jmp     return
1:      mov     eax, COW
        mov     rcx, rdi
        sub     rcx, rax
        cmp     rcx, 4 * PAGE
        jae     give_up
        and     edx, 3
        cmp     edx, 3
        jne     give_up
        call    allocate
        lea     rsi, [rbx + 7]
        mov     ecx, SHARED
3:      mov     rax, [rcx]
        mov     [rbx], rax
        add     rbx, 8
        add     ecx, 8
        test    ecx, 0xFFF
        jnz     3b
        call    map_page
        jmp     return
give_up:
        mov     [rsp + AT_RIP], r15
return:
        test    byte ptr [rsp + AT_CS], 3
        jnz     1f
        pop     rdi
        pop     rsi
        pop     rdx
        pop     rcx
        pop     rbx
        pop     rax
        mov     r11, [rsp + 8]
        mov     rsp, [rsp + 32]
        jmp     r11
1:      pop     rdi
        pop     rsi
        pop     rdx
        pop     rcx
        pop     rbx
        pop     rax
        mov     rdx, [rsp + 8]
        mov     rcx, [rsp + 32]
        .byte   0x48, 0x0F, 0x35        # SYSEXIT

general_protection:
        save
        mov     edx, 13
        xor     esi, esi
        call    log_fault
        jmp     give_up

# 0 end; 1 unmap RDI; 2 report the low bits of its entry; 3 load CR3 anew; 4 clear its A and D; 5 write-protect it; 6 report RDI
system_call:
        push    0
        save
        add     qword ptr [rsp + AT_RIP], 2
        mov     rdx, [rsp + 40]
        test    edx, edx
        jz      the_end
        cmp     edx, 3
        je      3f
        cmp     edx, 6
        je      6f
        call    find_entry
        cmp     edx, 2
        je      2f
        cmp     edx, 4
        je      4f
        cmp     edx, 5
        je      5f
        mov     qword ptr [rax], 0
        invlpg  [rdi]
        jmp     return
2:      mov     rdi, [rax]
        and     edi, 0xFFF
6:      mov     rax, [VARS + 8]
        mov     [VARS + 0x200 + rax], rdi
        add     rax, 8
        mov     [VARS + 8], rax
        jmp     return
3:      mov     rax, cr3
        mov     cr3, rax
        jmp     return
4:      and     qword ptr [rax], ~0x60
        invlpg  [rdi]
        jmp     return
5:      and     qword ptr [rax], ~2
        invlpg  [rdi]
        jmp     return
the_end:
        hlt
        jmp     the_end

# ---- the user program, on a page of its own -----------------------------------------------------------------------------

        .org    0x2000
        .macro  call_kernel number
        mov     eax, \number
        ud2
        .endm
        .macro  may_fault instruction:vararg
        lea     r15, [rip + 7f]
        \instruction
7:
        .endm

user:
        mov     edi, HEAP               # demand paging: 8 pages written to, 4 read
        mov     ebx, 1
1:      mov     [rdi + 8 * rbx], rbx
        add     ebx, 1
        add     rdi, PAGE
        cmp     ebx, 9
        jne     1b
        xor     esi, esi
2:      add     rsi, [rdi]
        add     rdi, PAGE
        add     ebx, 1
        cmp     ebx, 13
        jne     2b

        mov     ebp, COW                # copy-on-write: all read, two written to
        xor     esi, esi
        .irp    page, 0, 1, 2, 3
        add     rsi, [rbp + \page * PAGE + 16]
        .endr
        mov     rdi, rsi
        call_kernel 6
        mov     qword ptr [rbp + 24], 1
        lock add qword ptr [rbp + PAGE + 24], 2
        mov     rdi, [rbp + 2 * PAGE + 24]
        call_kernel 6

        mov     edi, HEAP               # accessed and dirty bits
        call_kernel 2
        call_kernel 4
        call_kernel 2
        mov     rbx, [rdi]
        call_kernel 2
        mov     [rdi], rbx
        call_kernel 2

        add     edi, PAGE               # a page that is write-protected under its TLB entry
        mov     [rdi], rbx
        call_kernel 5
        may_fault mov [rdi + 40], rbx
        mov     rbx, [rdi]

        add     edi, PAGE               # one that is unmapped, and comes back empty
        call_kernel 1
        mov     rbx, [rdi + 24]
        push    rdi
        mov     rdi, rbx
        call_kernel 6
        pop     rdi

        mov     ebx, BASE               # what user code may not do
        may_fault mov rax, [rbx]
        may_fault mov [rbx], rax
        mov     ebx, BASE + 0x2000
        may_fault mov [rbx], rax
        may_fault jmp kernel_code
        mov     ebx, HEAP + 40 * PAGE
        may_fault jmp rbx               # on demand first, and then no code
        mov     rbx, 0x800000000000
        may_fault mov rax, [rbx]        # not canonical
        mov     ebx, 0xFFFFFFF8
        may_fault mov rax, [rbx]        # nothing there

        mov     ebx, HEAP + 13 * PAGE   # a store across two pages, the second of which is not there
        mov     [rbx - 5], rsi
        mov     ebx, HEAP + 16 * PAGE   # and one across two that are not there; of an add
        add     [rbx - 3], rsi

        call_kernel 3                   # a new TLB: everything is still there
        mov     edi, HEAP + 8
        xor     esi, esi
        xor     ebx, ebx
3:      add     rsi, [rdi]
        add     rdi, PAGE + 8
        add     ebx, 1
        cmp     ebx, 16
        jne     3b
        mov     rdi, rsi
        call_kernel 6
        call_kernel 0
        .set    kernel_code, user - 0x2000
        .org    0x3000
