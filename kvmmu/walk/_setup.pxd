"""Set up a walk: fill all of a `kvm_pagewalk` that follows from a role and a processor model."""

from libc.stdint cimport uint64_t

from kvmmu._walk cimport cpu_caps, kvm_pagewalk
from kvmmu.arch._format cimport PageFormat

# IN lam: lam_of(), the bits of CR3
cdef void init_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, uint64_t lam, const cpu_caps *caps) noexcept nogil
# Translate the tables of a first stage, and its results, by the second stage n (NULL: by identity). IN npt: nested paging of
# SVM. The role and the format must be in force
cdef void use_second_stage(kvm_pagewalk *w, const kvm_pagewalk *n, bint npt) noexcept nogil
cdef void init_ept_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, const cpu_caps *caps, bint advanced_info) noexcept nogil
# IN host_smep: CR4.SMEP of the host, whose place in the role GMET has taken
cdef void init_npt_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, const cpu_caps *caps, bint host_smep) noexcept nogil
# Make a walk of the second stage n alone, with the statuses of a second stage
cdef void init_second_stage_walk(kvm_pagewalk *w, const kvm_pagewalk *n) noexcept nogil
cdef int pse36_bits(const cpu_caps *caps) noexcept nogil
# Fill the format of legacy tables, and the parameters it was made from. IN tdp: they are a second stage (NPT)
cdef void fill_format(PageFormat fmt, uint64_t role, const cpu_caps *caps, bint tdp) noexcept
# Fill the format of EPT tables. IN huge_page_level: of the largest page
cdef void fill_ept_format(PageFormat fmt, uint64_t role, const cpu_caps *caps, int huge_page_level) noexcept
