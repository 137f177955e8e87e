"""The TLB-fill hook of an emulator as compiled code: what `kvmmu.embed.unicorn` registers with Unicorn.

Unicorn asks for a page when its TLB has none for an access. The hook reads the registers of the processor, which the guest may
have changed since, translates by a vCPU of the function table, and answers with a page and with the rights that need no further
accessed and dirty bits: an access that needs more makes Unicorn ask again.

Unicorn keeps pages of 4 KiB. INVLPG of one in a large page is to drop all of that page, and Unicorn tells of no INVLPG: the hook
looks for the instruction in the code that is fetched, and has Unicorn call `on_invlpg()` before it.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memchr, memset

from kvmmu.arch._bits cimport ACCESS_AC_MASK, PAGE_OFFSET_MASK, PAGE_SIZE, RFLAGS_AC_MASK
from kvmmu.embed._lookups cimport c_lookup
from kvmmu.embed._memories cimport c_memory_add, c_memory_create, c_memory_free
from kvmmu.embed._models cimport fill_cpu
from kvmmu.embed._registers cimport c_set_registers, c_vcpu_create
from kvmmu.embed._structs cimport (
    KVMMU_ACCESS_NO_AD, KVMMU_E_MEMORY, KVMMU_OK, kvmmu_cpu, kvmmu_mapping, kvmmu_memory, kvmmu_registers, kvmmu_result,
    kvmmu_vcpu,
)
from kvmmu.embed._vcpus cimport c_translate, c_vcpu_free, c_vcpu_release
from kvmmu.memory._maker cimport check_maker, maker

from kvmmu.embed.c_api import error_text

cdef enum:
    PROT_READ = 1
    PROT_WRITE = 2
    PROT_EXEC = 4
    PROT_ALL = PROT_READ | PROT_WRITE | PROT_EXEC
    ACCESS_READ = 0
    ACCESS_WRITE = 2
    ACCESS_USER = 4
    ACCESS_FETCH = 16
    ACCESS_IMPLICIT = 32
    MEM_READ = 16                       # Unicorn's uc_mem_type
    MEM_WRITE = 17
    CPL_MASK = 3
    EFER_NUMBER_LOW = 0x80              # of IA32_EFER, 0xC0000080
    MOST_PREFIXES = 4                   # bytes before the opcode that an instruction may begin with
    OPCODE_0F = 0x0f
    OPCODE_01 = 0x01

# Unicorn's uc_tlb_entry, uc_x86_msr and uc_x86_mmr.
cdef struct tlb_entry:
    uint64_t paddr
    uint32_t perms

cdef struct model_specific:
    uint32_t number
    uint64_t value

cdef struct descriptor_table:
    uint16_t selector
    uint64_t base
    uint32_t limit
    uint32_t flags

cdef struct ram_slot:
    uint64_t gpa
    uint64_t size
    const uint8_t *host

ctypedef int (*read_fn)(void *uc, int register, void *value) noexcept nogil
ctypedef int (*hook_fn)(void *uc, size_t *hook, int kind, void *callback, void *data, uint64_t begin, uint64_t end,
                        ...) noexcept nogil
ctypedef int (*control_fn)(void *uc, uint32_t control, ...) noexcept nogil

# Numbers of Unicorn's, from its Python constants.
cdef struct unicorn_numbers:
    int cr0, cr3, cr4, msr, eflags, ss, gdtr, idtr, tr, hook_code
    uint32_t flush

cdef struct fill_state:
    void *uc
    read_fn read_register
    hook_fn add_hook
    control_fn control
    unicorn_numbers numbers
    kvmmu_vcpu vcpu
    kvmmu_registers registers
    ram_slot *slots
    size_t slot_count
    uint64_t *hooked                    # addresses of INVLPG instructions that have a hook
    size_t hooked_count
    bint large                          # the TLB may have parts of a large page
    bint entering                       # the gate of `unicorn.py` is open
    uint64_t gate_gva, gate_gpa
    bint trapping                       # an access that fails leads to trap_gpa, where there is no memory
    uint64_t trap_gpa
    int code                            # KVMMU_E_* of the call that failed, or KVMMU_OK
    bint failed                         # an access of the guest
    uint64_t gva                        # its page
    int kind                            # uc_mem_type
    kvmmu_result fault
    uint64_t fills


# ---- the hook ----------------------------------------------------------------------------------------------------------

cdef int load_registers(fill_state *s, uint32_t *access) noexcept nogil:
    """Take the registers of Unicorn's processor. OUT access: USER and AC, as they are now. Returns KVMMU_E_*."""
    cdef kvmmu_registers *r = &s.registers
    cdef uint64_t cr0 = 0, cr3 = 0, cr4 = 0, rflags = 0
    cdef uint16_t ss = 0
    cdef model_specific efer
    efer.number, efer.value = <uint32_t>0xC0000000 | EFER_NUMBER_LOW, 0
    s.read_register(s.uc, s.numbers.cr0, &cr0)
    s.read_register(s.uc, s.numbers.cr3, &cr3)
    s.read_register(s.uc, s.numbers.cr4, &cr4)
    s.read_register(s.uc, s.numbers.msr, &efer)
    s.read_register(s.uc, s.numbers.eflags, &rflags)
    s.read_register(s.uc, s.numbers.ss, &ss)
    access[0] = ACCESS_USER if ss & CPL_MASK == CPL_MASK else 0
    if rflags & RFLAGS_AC_MASK:
        access[0] |= <uint32_t>ACCESS_AC_MASK
    if r.cr0 == cr0 and r.cr3 == cr3 and r.cr4 == cr4 and r.efer == efer.value:
        return KVMMU_OK
    r.cr0, r.cr3, r.cr4, r.efer = cr0, cr3, cr4, efer.value
    return c_set_registers(s.vcpu, r)


cdef bint in_system_table(fill_state *s, uint64_t gva) noexcept nogil:
    """True if a page has a part of the GDT, IDT or TSS: user code gets there by implicit accesses alone."""
    cdef int numbers[3]
    cdef descriptor_table table
    cdef int i
    numbers[0], numbers[1], numbers[2] = s.numbers.gdtr, s.numbers.idtr, s.numbers.tr
    for i in range(3):
        memset(&table, 0, sizeof(table))
        s.read_register(s.uc, numbers[i], &table)
        if table.limit and gva + PAGE_OFFSET_MASK >= table.base and gva <= table.base + table.limit:
            return True
    return False


cdef bint allows(fill_state *s, uint64_t gva, uint32_t access) noexcept nogil:
    """True if an access of this kind would succeed, and set no dirty bit."""
    cdef kvmmu_mapping m
    if c_lookup(s.vcpu, gva, access | KVMMU_ACCESS_NO_AD, &m) != KVMMU_OK or m.status:
        return False
    return m.dirty or not m.level or not access & ACCESS_WRITE


cdef void on_invlpg(void *uc, uint64_t address, uint32_t size, void *data) noexcept nogil:
    """Drop every page when INVLPG may be about to run."""
    cdef fill_state *s = <fill_state *>data
    if s.large:
        s.large = False
        s.control(s.uc, s.numbers.flush)


cdef int hook_instruction(fill_state *s, uint64_t gva) noexcept nogil:
    """Make Unicorn call on_invlpg() before the instruction whose opcode is at gva, wherever it begins."""
    cdef size_t i, hook
    cdef uint64_t *grown
    for i in range(s.hooked_count):
        if s.hooked[i] == gva:
            return KVMMU_OK
    grown = <uint64_t *>realloc(s.hooked, (s.hooked_count + 1) * sizeof(uint64_t))
    if grown is NULL:
        return KVMMU_E_MEMORY
    s.hooked = grown
    s.hooked[s.hooked_count] = gva
    s.hooked_count += 1
    s.add_hook(s.uc, &hook, s.numbers.hook_code, <void *>on_invlpg, s, gva - MOST_PREFIXES, gva)
    return KVMMU_OK


cdef int find_invlpg(fill_state *s, uint64_t gva, uint64_t gpa) noexcept nogil:
    """Hook what may be an INVLPG (0F 01 /7 with a memory operand) in a page of code, or begin at its end."""
    cdef const uint8_t *page = NULL
    cdef const uint8_t *at
    cdef size_t i
    cdef int code = KVMMU_OK
    for i in range(s.slot_count):
        if gpa - s.slots[i].gpa < s.slots[i].size:
            page = s.slots[i].host + (gpa - s.slots[i].gpa)
    at = page
    while at is not NULL and code == KVMMU_OK:
        at = <const uint8_t *>memchr(at, OPCODE_0F, page + PAGE_SIZE - at)
        if at is NULL:
            break
        i = at - page
        if i + 1 == PAGE_SIZE or (at[1] == OPCODE_01 and (i + 2 == PAGE_SIZE or (at[2] >> 3 & 7 == 7 and at[2] >> 6 != 3))):
            code = hook_instruction(s, gva + i)
        at += 1
        if i + 1 == PAGE_SIZE:
            break
    return code


cdef bint fail(fill_state *s, uint64_t gva, int kind, int code, tlb_entry *entry) noexcept nogil:
    s.failed, s.gva, s.kind, s.code = True, gva, kind, code
    entry.paddr, entry.perms = s.trap_gpa, PROT_ALL
    return s.trapping and code == KVMMU_OK


cdef bint fill_tlb(void *uc, uint64_t gva, int kind, tlb_entry *entry, void *data) noexcept nogil:
    """Return True, and a page in entry, if the access may be made. IN gva: of a page."""
    cdef fill_state *s = <fill_state *>data
    cdef uint32_t who, access
    cdef int code
    s.fills += 1
    if s.entering and gva == s.gate_gva:
        entry.paddr, entry.perms = s.gate_gpa, PROT_ALL
        return True
    code = load_registers(s, &who)
    if code != KVMMU_OK:
        return fail(s, gva, kind, code, entry)
    if who & ACCESS_USER and kind == MEM_READ and in_system_table(s, gva):
        who = ACCESS_IMPLICIT
    access = who | (ACCESS_WRITE if kind == MEM_WRITE else ACCESS_READ if kind == MEM_READ else ACCESS_FETCH)
    code = c_translate(s.vcpu, gva, access, &s.fault)
    if code != KVMMU_OK or s.fault.status:
        return fail(s, gva, kind, code, entry)
    entry.paddr = s.fault.gpa
    entry.perms = PROT_READ
    s.large = s.large or s.fault.level > 1
    if kind == MEM_WRITE or allows(s, gva, who | ACCESS_WRITE):
        entry.perms |= PROT_WRITE
    if kind != MEM_READ and kind != MEM_WRITE:
        code = find_invlpg(s, gva, entry.paddr)
        entry.perms |= PROT_EXEC
        if code != KVMMU_OK:
            return fail(s, gva, kind, code, entry)
        if not allows(s, gva, who | ACCESS_READ):
            entry.perms &= ~<uint32_t>PROT_READ
    elif kind == MEM_WRITE and not allows(s, gva, who | ACCESS_READ):
        entry.perms &= ~<uint32_t>PROT_READ
    return True


# ---- for Python --------------------------------------------------------------------------------------------------------

def new_tlb_fill(list slots not None, cpu not None, uintptr_t uc, uintptr_t read_register, uintptr_t add_hook,
                 uintptr_t control, dict numbers not None):
    """Return the state behind the hook.

    Parameters
    ----------
    slots : list of (int, ndarray of uint8)
        Guest-physical addresses and the bytes there.
    cpu : CpuModel
    uc, read_register, add_hook, control : int
        Addresses: Unicorn's handle, `uc_reg_read`, `uc_hook_add`, `uc_ctl`.
    numbers : dict
        Unicorn's numbers, by the names of `unicorn_numbers`.
    """
    cdef TlbFill fill = TlbFill.__new__(TlbFill, maker())
    cdef fill_state *s = fill.state
    cdef kvmmu_cpu model
    cdef uintptr_t address
    if not uc or not read_register or not add_hook or not control:
        raise ValueError("uc, read_register, add_hook, control: want addresses, got 0")
    fill.arrays = slots
    s.uc, s.read_register = <void *>uc, <read_fn>read_register
    s.add_hook, s.control = <hook_fn>add_hook, <control_fn>control
    s.numbers = numbers
    s.slots = <ram_slot *>calloc(max(len(slots), 1), sizeof(ram_slot))
    if s.slots is NULL:
        raise MemoryError
    for gpa, data in slots:
        address = data.ctypes.data
        s.slots[s.slot_count].gpa, s.slots[s.slot_count].size = gpa, data.nbytes
        s.slots[s.slot_count].host = <const uint8_t *>address
        s.slot_count += 1
        check(c_memory_add(fill.memory, gpa, <void *>address, data.nbytes, 0))
    fill_cpu(&model, cpu)
    check(c_vcpu_create(fill.memory, &model, &s.vcpu))
    s.registers.size = sizeof(kvmmu_registers)
    return fill


cdef class TlbFill:
    """The state behind the hook, and the accesses of an emulator that go through it. Made by an Emulator.

    Attributes
    ----------
    hook, data : int
        Addresses of the function for UC_HOOK_TLB_FILL, and of its user data.
    """

    cdef fill_state *state
    cdef kvmmu_memory memory
    cdef list arrays
    cdef readonly uintptr_t hook, data

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a TlbFill is made by an Emulator")
        self.state = <fill_state *>calloc(1, sizeof(fill_state))
        if self.state is NULL:
            raise MemoryError
        check(c_memory_create(&self.memory))
        self.hook, self.data = <uintptr_t>fill_tlb, <uintptr_t>self.state

    def __dealloc__(self):
        if self.state is not NULL:
            c_vcpu_free(self.state.vcpu)
            c_memory_free(self.memory)
            free(self.state.slots)
            free(self.state.hooked)
            free(self.state)

    def release(self):
        """Let another thread use it."""
        check(c_vcpu_release(self.state.vcpu))

    def begin(self, *, trapping=False, trap_gpa=0):
        """Forget the last fault. trapping: from now on an access that fails leads to trap_gpa."""
        self.state.failed, self.state.trapping, self.state.trap_gpa = False, trapping, trap_gpa
        self.state.code = KVMMU_OK

    def open_gate(self, gva, gpa):
        """Map one page for everybody, until `close_gate()`."""
        self.state.gate_gva, self.state.gate_gpa, self.state.entering = gva, gpa, True

    def close_gate(self):
        self.state.entering = False

    def flushed(self):
        """Note that the emulator has dropped its TLB."""
        self.state.large = False

    def set_pkru(self, value):
        """Load PKRU, which Unicorn does not tell of."""
        self.state.registers.pkru = value
        self.state.registers.cr0 = ~<uint64_t>0             # none: the next access loads all of them

    @property
    def fills(self):
        """The number of pages that Unicorn asked for."""
        return int(self.state.fills)

    @property
    def fault(self):
        """(page, uc_mem_type, status, error code) of the access that failed, or None."""
        if self.state.code != KVMMU_OK:
            raise RuntimeError(f"TLB fill: {error_text(self.state.code)}")
        if not self.state.failed:
            return None
        return int(self.state.gva), self.state.kind, self.state.fault.status, int(self.state.fault.error_code)

    def translate(self, gva, access):
        """Return (status, guest-physical address, error code) of an access that the emulator makes for the processor."""
        cdef uint32_t who
        cdef kvmmu_result r
        check(load_registers(self.state, &who))
        check(c_translate(self.state.vcpu, gva, access, &r))
        return r.status, int(r.gpa), int(r.error_code)


cdef int check(int code) except -1:
    if code != KVMMU_OK:
        raise RuntimeError(f"kvmmu: {error_text(code)}")
    return 0
