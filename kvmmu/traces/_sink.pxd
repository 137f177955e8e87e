"""Rows under construction: what the readers of foreign formats write into, and a map of 64-bit numbers."""

from libc.stdint cimport uint8_t, uint16_t, uint64_t

from kvmmu.arch._bits cimport (
    ACCESS_AC_MASK, ACCESS_FETCH_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK, OP_FETCH, OP_KIND_MASK, OP_STORE,
)

cdef enum:
    SLACK = 64                      # rows that a reader may write after it asked is_full()
    SPARE_SETS = 3                  # of arrays: one is held by who took it, one by who looks at the rows before

ctypedef struct row_sink:
    uint8_t *op
    uint64_t *addr
    uint8_t *access
    uint8_t *size
    uint64_t *ip
    uint16_t *vcpu                  # NULL: the format has none
    uint64_t *gpa                   # NULL: likewise
    uint64_t *value                 # likewise
    size_t n
    size_t capacity
    uint16_t vcpu_now               # of the rows that are written
    uint16_t vcpus_seen             # bitwise or of all of them
    bint gpa_seen
    uint64_t ips_seen               # likewise

# An open-addressing hash map from u64 to u64. Key 0 is stored apart.
ctypedef struct u64_map:
    uint64_t *keys
    uint64_t *values
    size_t mask                     # slots - 1
    size_t used
    bint has_zero
    uint64_t zero_value


# True if the rows of one more record may not fit.
cdef inline bint is_full(const row_sink *s) noexcept nogil:
    return s.n + SLACK > s.capacity


# WRITE of a store, FETCH of a fetch.
cdef inline uint8_t kind_of(uint8_t op) noexcept nogil:
    if (op & OP_KIND_MASK) == OP_STORE:
        return ACCESS_WRITE_MASK
    return ACCESS_FETCH_MASK if (op & OP_KIND_MASK) == OP_FETCH else 0


# The access byte of an access: a supervisor's if the instruction is in the upper half of the address space.
# who: the instruction pointer, or the address where none is known. As AC a supervisor's access to the lower half passes SMAP.
cdef inline uint8_t access_of(uint8_t op, uint64_t addr, uint64_t who) noexcept nogil:
    cdef uint8_t access = kind_of(op)
    if who >> 63 == 0:
        return access | ACCESS_USER_MASK
    return access if addr >> 63 else access | ACCESS_AC_MASK


cdef void put_wide(row_sink *s, uint8_t op, uint64_t addr, uint8_t access, uint64_t size, uint64_t ip,
                   uint64_t gpa) noexcept nogil


# Write a row. IN size: 1 to 255. Guarantee: is_full() was asked. A loop that copies the sink to a variable of its own, and gives
# its address to no other function, need not load it again for each row: a byte that is stored may change any other variable.
cdef inline void put_row(row_sink *s, uint8_t op, uint64_t addr, uint8_t access, uint64_t size, uint64_t ip,
                         uint64_t gpa) noexcept nogil:
    cdef size_t n = s.n
    s.op[n] = op
    s.addr[n] = addr
    s.access[n] = access
    s.size[n] = <uint8_t>size
    s.ip[n] = ip
    s.ips_seen |= ip
    if s.vcpu != NULL:
        s.vcpu[n] = s.vcpu_now
        s.vcpus_seen |= s.vcpu_now
    if s.gpa != NULL:
        s.gpa[n] = gpa
        if gpa != ~<uint64_t>0:
            s.gpa_seen = True
    if s.value != NULL:
        s.value[n] = 0
    s.n = n + 1


# Write a row; of more than 255 bytes: see put_wide(). IN size: 1 to 65,535. Guarantee: is_full() was asked.
cdef inline void put(row_sink *s, uint8_t op, uint64_t addr, uint8_t access, uint64_t size, uint64_t ip,
                     uint64_t gpa) noexcept nogil:
    if size > 255:
        put_wide(s, op, addr, access, size, ip, gpa)
    else:
        put_row(s, op, addr, access, size, ip, gpa)


# Write a row that is an event, with its value. Guarantee: is_full() was asked, and the sink has values.
cdef inline void put_event(row_sink *s, uint8_t op, uint64_t addr, uint8_t size, uint64_t value) noexcept nogil:
    cdef size_t n = s.n
    put(s, op, addr, 0, size, 0, ~<uint64_t>0)
    s.value[n] = value


cdef int map_init(u64_map *m) noexcept nogil
cdef void map_free(u64_map *m) noexcept nogil
# Set the value of a key; 1 if the key is new, 0 if not, -1 if memory ran out.
cdef int map_set(u64_map *m, uint64_t key, uint64_t value) noexcept nogil
# The value of a key, or `missing`.
cdef uint64_t map_get(const u64_map *m, uint64_t key, uint64_t missing) noexcept nogil


cdef class Sink:
    cdef row_sink rows
    cdef dict arrays
    cdef list spare                 # sets of arrays that were given away
    cdef bint with_vcpu, with_gpa, with_size, with_value
    cdef int refill(self) except -1
