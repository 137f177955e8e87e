"""The register sets of a replay; see `_replay_registers.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memset

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport NEVER_SEEN, SlotTable, gpa_to_hva, guest_mem, kvmmu_load64
from kvmmu.replay._replay_registers cimport NO_SET, TRANSITIONS, transition
from kvmmu.walk._register_sets cimport RegisterSets, RegisterSetWalks
from kvmmu.walk._second_stage cimport SecondStage
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu.arch.arguments import check_int

cdef enum:
    MOST_VCPUS = 1 << 16
    PDPTES = 4


cdef class ReplayRegisters:
    """Register sets by number, and the number of the one in force on each vCPU.

    Attributes
    ----------
    count : int
        How many sets there are.
    vcpus : int
    """

    def __cinit__(self, mark=None, walk=None, vcpu_count=0, *args):
        cdef Py_ssize_t vcpus
        check_maker(mark, "ReplayRegisters are made by a replay")
        vcpus = vcpu_count
        if not 1 <= vcpus <= MOST_VCPUS:
            raise ValueError(f"vcpus: want 1 to {int(MOST_VCPUS)}, got {vcpus}")
        self.walk, self.vcpus = walk, <uint32_t>vcpus
        self.owners, self.bound, self.stages, self.taken = [], [], {}, {}
        self.current = <uint32_t *>calloc(vcpus, sizeof(uint32_t))
        self.last_nested = <uint32_t *>calloc(vcpus, sizeof(uint32_t))
        self.transitions = <transition *>calloc(TRANSITIONS, sizeof(transition))
        if self.current is NULL or self.last_nested is NULL or self.transitions is NULL:
            raise MemoryError
        memset(self.current, 0xFF, vcpus * sizeof(uint32_t))
        memset(self.last_nested, 0xFF, vcpus * sizeof(uint32_t))
        self.table = NEVER_SEEN

    def __dealloc__(self):
        free(self.walks)
        free(self.current)
        free(self.last_nested)
        free(self.transitions)

    def add(self, RegisterSets contexts not None):
        """Take a register set, unless it was taken before; returns its number.

        Raises
        ------
        ValueError
            They are not one.
        """
        cdef kvm_pagewalk *grown
        cdef uint32_t room = 2 * self.room + 4
        if contexts.count != 1:
            raise ValueError(f"contexts: want one register set, got {contexts.count}")
        number = self.taken.get(id(contexts))
        if number is not None:
            return number
        if self.count == self.room:
            grown = <kvm_pagewalk *>realloc(self.walks, room * sizeof(kvm_pagewalk))
            if grown is NULL:
                raise MemoryError
            self.walks, self.room = grown, room
        self.owners.append(contexts)
        self.taken[id(contexts)] = int(self.count)
        self.bound.append(None)
        self.bind_one(self.count, self.walk.mem.current())
        self.count += 1
        self.version += 1
        return int(self.count) - 1

    def drop_all(self):
        """Forget all sets and what events led to; none is in force on any vCPU."""
        self.count = 0
        self.owners, self.bound, self.stages, self.taken = [], [], {}, {}
        memset(self.current, 0xFF, self.vcpus * sizeof(uint32_t))
        memset(self.last_nested, 0xFF, self.vcpus * sizeof(uint32_t))
        memset(self.transitions, 0, TRANSITIONS * sizeof(transition))
        self.version += 1

    def use(self, Py_ssize_t vcpu, number):
        """Put a register set in force on a vCPU."""
        cdef uint32_t to = check_int("number", number, 0, int(self.count) - 1)
        self.check_vcpu(vcpu)
        self.put_in_force(<uint32_t>vcpu, to)

    def in_force(self, Py_ssize_t vcpu):
        """Return the number of the register set in force on a vCPU."""
        self.check_vcpu(vcpu)
        return None if self.current[vcpu] == NO_SET else int(self.current[vcpu])

    def nested_last(self, Py_ssize_t vcpu):
        """Return the number of the set of a nested guest that was in force last on a vCPU; None if none was."""
        self.check_vcpu(vcpu)
        return None if self.last_nested[vcpu] == NO_SET else int(self.last_nested[vcpu])

    def remember(self, before, op, value, after, pdpt=None):
        """Carry out an event so from now on.

        Parameters
        ----------
        before, after : int
            Numbers of the register sets in force before and behind it.
        op, value : int
            Of its row.
        pdpt : int, optional
            It loads PDPTEs from memory there, and goes this way as long as they are what they are now.
        """
        cdef transition found
        cdef SlotTable table = self.walk.mem.current()
        memset(&found, 0, sizeof(found))
        found.op, found.value = check_int("op", op, 1, 255), check_int("value", value, 0, (1 << 64) - 1)
        found.before = check_int("before", before, 0, int(self.count) - 1)
        found.after = check_int("after", after, 0, int(self.count) - 1)
        if pdpt is not None:
            found.loads, found.pdpt = True, check_int("pdpt", pdpt, 0, (1 << 64) - 1)
            if found.pdpt % sizeof(found.pdptes):
                raise ValueError(f"pdpt: want a multiple of {sizeof(found.pdptes)}, got {pdpt:#x}")
            read_pdptes(&table.mem, found.pdpt, found.pdptes)
        self.transitions[slot_of(found.before, found.op, found.value)] = found

    cdef int check_vcpu(self, Py_ssize_t vcpu) except -1:
        if not 0 <= vcpu < <Py_ssize_t>self.vcpus:
            raise ValueError(f"vcpu: want 0 to {self.vcpus - 1}, got {vcpu}")
        return 0

    cdef int bind(self, SlotTable table) except -1:
        cdef uint32_t number
        if table.number == self.table:
            return 0
        self.table = NEVER_SEEN                         # until all are
        for number in range(self.count):
            self.bind_one(number, table)
        self.table = table.number
        self.version += 1
        return 0

    cdef int bind_one(self, uint32_t number, SlotTable table) except -1:
        cdef RegisterSets contexts = self.owners[number]
        cdef RegisterSetWalks walks = contexts.walks_over(table)
        cdef kvm_pagewalk *w = &self.walks[number]
        cdef SecondStage second = walks.seconds[walks.walks[0].second]
        w[0] = walks.walks[0]
        # a log is one set's own, and so is what is cached of a walk that fills it
        key = None if second is None else number if w.ngpa.pml is not NULL else second.stage
        w.second = self.stages.setdefault(key, len(self.stages))
        self.bound[number] = walks
        return 0

    cdef void put_in_force(self, uint32_t vcpu, uint32_t number) noexcept nogil:
        self.current[vcpu] = number
        if self.walks[number].ngpa is not NULL:
            self.last_nested[vcpu] = number

    cdef bint follow(self, const guest_mem *mem, uint32_t vcpu, uint8_t op, uint64_t value) noexcept nogil:
        cdef uint32_t before = self.current[vcpu]
        cdef const transition *t = &self.transitions[slot_of(before, op, value)]
        cdef uint64_t pdptes[PDPTES]
        if t.op != op or t.before != before or t.value != value:
            return False
        if t.loads:
            read_pdptes(mem, t.pdpt, pdptes)
            if memcmp(pdptes, t.pdptes, sizeof(pdptes)):
                return False
        self.put_in_force(vcpu, t.after)
        return True


cdef inline uint32_t slot_of(uint32_t before, uint8_t op, uint64_t value) noexcept nogil:
    cdef uint64_t key = value ^ <uint64_t>op << 56 ^ <uint64_t>before << 32
    return <uint32_t>((key * <uint64_t>0x9E3779B97F4A7C15ULL) >> 40) % TRANSITIONS


cdef void read_pdptes(const guest_mem *mem, uint64_t gpa, uint64_t *pdptes) noexcept nogil:
    """Read the PDPTEs at gpa, which are in one page; zeros in a hole."""
    cdef bint readonly = False
    cdef const uint8_t *hva = gpa_to_hva(mem, gpa, &readonly)
    cdef int i
    for i in range(PDPTES):
        pdptes[i] = 0 if hva is NULL else kvmmu_load64(hva + i * sizeof(uint64_t))


cdef ReplayRegisters new_registers(PageWalk walk, Py_ssize_t vcpus):
    return ReplayRegisters.__new__(ReplayRegisters, maker(), walk, vcpus)
