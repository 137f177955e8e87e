"""The tables of what a TLB entry allows, as `_rights.pxd` describes them."""

from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk, second_stage_access
from kvmmu.arch._bits cimport (
    ACCESS_WRITE_MASK, ACC_ALL, ACC_USER_MASK, PERMISSIONS_COUNT, PERMISSIONS_INDEX_SHIFT, PFERR_PK_MASK, PKRU_KEYS,
    ROLE_DIRECT_MASK,
)
from kvmmu.arch._format cimport permission_fault
from kvmmu.machine._rights cimport rights_tables


cdef void load_rights(rights_tables *rights, const kvm_pagewalk *hw, const kvm_pagewalk *stage) noexcept nogil:
    """Fill the tables, each from the rights of its own condition alone."""
    cdef uint32_t i, acc, pkey, access, user, nested, epoch = rights.epoch + 1
    memset(rights, 0, sizeof(rights_tables))
    rights.epoch = epoch
    for i in range(<uint32_t>PERMISSIONS_COUNT):
        access = i << PERMISSIONS_INDEX_SHIFT
        if access & ACCESS_WRITE_MASK:
            rights.writes |= <uint16_t>1 << i
        for acc in range(<uint32_t>ACC_ALL + 1):
            if hw.cpu_role & ROLE_DIRECT_MASK or not (hw.fmt.permissions[i] >> acc) & 1:
                rights.guest[acc] |= <uint16_t>1 << i
            for user in range(2):
                if hw.ngpa is NULL:
                    rights.nested[user][acc] |= <uint16_t>1 << i
                    continue
                nested = second_stage_access(stage, access, True, <uint32_t>ACC_USER_MASK if user else 0)
                if not (stage.fmt.permissions[nested >> PERMISSIONS_INDEX_SHIFT] >> acc) & 1:
                    rights.nested[user][acc] |= <uint16_t>1 << i
        for pkey in range(<uint32_t>PKRU_KEYS):
            if hw.cpu_role & ROLE_DIRECT_MASK or not (
                    permission_fault(hw.fmt, hw.vcpu.keys, <uint32_t>ACC_USER_MASK, pkey, access) & PFERR_PK_MASK):
                rights.keys[pkey] |= <uint16_t>1 << i
