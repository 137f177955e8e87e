"""Registers as the walks read them: of one vCPU, and of many register sets prepared for batches."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from kvmmu._bits cimport (
    ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_EXT_CR4_SMAP_MASK,
)
from kvmmu._format cimport PageFormat, permission_params
from kvmmu._memory cimport GuestMemory
from kvmmu._roles cimport calc_cpu_role, kvm_mmu_role_regs
from kvmmu._walk cimport cpu_caps, init_page_format, init_pagewalk, kvm_pagewalk, vcpu_arch

import numpy as np


cdef class VcpuArch:
    def load(self, regs):
        """Take the registers of a `Regs`."""
        load_arch(&self.arch, regs)


cdef int load_arch(vcpu_arch *arch, regs) except -1:
    arch.cr0, arch.cr3, arch.cr4, arch.efer = regs.cr0, regs.cr3, regs.cr4, regs.efer
    arch.pkru, arch.rflags = regs.pkru, regs.rflags
    for i in range(4):
        arch.pdptrs[i] = regs.pdptrs[i] if regs.pdptrs is not None else 0
    return 0


cdef uint64_t role_of(const vcpu_arch *arch, bint smm, bint guest_mode) noexcept:
    cdef kvm_mmu_role_regs regs
    regs.cr0, regs.cr4, regs.efer = arch.cr0, arch.cr4, arch.efer
    return calc_cpu_role(&regs, smm, guest_mode)


cdef class Contexts:
    """Register sets prepared once for many `translate(regs=...)` calls; made by `PageWalk.prepare()`."""

    def __cinit__(self, Py_ssize_t count):
        self.count = count
        self.formats = []
        self.tables = []
        self.arches = <vcpu_arch *>calloc(max(count, 1), sizeof(vcpu_arch))
        self.walks = <kvm_pagewalk *>calloc(max(count, 1), sizeof(kvm_pagewalk))
        if self.arches is NULL or self.walks is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.arches)
        free(self.walks)

    def __len__(self):
        return self.count

    cdef void use_memory(self, GuestMemory mem):
        cdef Py_ssize_t i
        if self.tables and self.tables[-1] is mem.table:
            return
        self.tables.append(mem.table)
        for i in range(self.count):
            self.walks[i].mem = &mem.table.mem

    cdef int reload(self, Py_ssize_t i, legal) except -1:
        """Take the registers of row i again, PDPTEs included; the role must not change."""
        if not 0 <= i < self.count:
            raise ValueError(f"row {i} is beyond the {self.count} register sets")
        load_arch(&self.arches[i], legal)
        if role_of(&self.arches[i], False, False) != self.walks[i].cpu_role:
            raise ValueError(f"row {i}: the registers make another role; prepare() the sets anew")
        return 0

    cdef object widths(self):
        """Masks of the linear-address width, one per register set."""
        cdef Py_ssize_t i
        return np.array([self.walks[i].gva_mask for i in range(self.count)], np.uint64)


cdef void fill_format(PageFormat fmt, uint64_t role, const cpu_caps *caps) noexcept:
    """The format of a paging role, and the parameters it was made from."""
    cdef permission_params p
    init_page_format(&fmt.fmt, role, caps)
    p.tdp = p.ept = False
    p.smep = (role & ROLE_CR4_SMEP_MASK) != 0
    p.smap = (role & ROLE_EXT_CR4_SMAP_MASK) != 0
    p.wp = (role & ROLE_CR0_WP_MASK) != 0
    p.nx = (role & ROLE_EFER_NX_MASK) != 0
    fmt.params = p


cdef Contexts prepare_contexts(list rows, admit, const cpu_caps *caps):
    """Check and prepare register sets. Equal roles share a format."""
    cdef Contexts contexts = Contexts(len(rows))
    cdef Py_ssize_t i
    cdef uint64_t role
    cdef PageFormat fmt
    formats, admitted = {}, {}
    for i, row in enumerate(rows):
        legal = admitted.get(row)
        if legal is None:
            try:
                legal = admitted[row] = admit(row)
            except Exception as error:
                error.add_note(f"in row {i} of regs: {row}")
                raise
        load_arch(&contexts.arches[i], legal)
        role = role_of(&contexts.arches[i], False, False)
        fmt = formats.get(role)
        if fmt is None:
            fmt = formats[role] = PageFormat()
            if not role & ROLE_DIRECT_MASK:
                fill_format(fmt, role, caps)
            contexts.formats.append(fmt)
        init_pagewalk(&contexts.walks[i], role, caps)
        contexts.walks[i].vcpu = &contexts.arches[i]
        contexts.walks[i].fmt = &fmt.fmt
    return contexts
