"""MachineLock: the lock of one virtual machine, KVM's mmu_lock.

A thread that holds it may take it again. `acquire()` and `release()` need the GIL; whoever holds the lock may then let go of the
GIL. Its holder and count are read and written under the GIL alone.
"""

from cpython.pythread cimport PyThread_type_lock


cdef class MachineLock:
    cdef PyThread_type_lock real
    cdef unsigned long owner        # thread that holds it, while count is not 0
    cdef size_t count               # how often it holds it
    cdef unsigned long epoch        # forks of this process when it was made, or taken over
    cdef bint torn                  # another thread held it when this process was forked: what it guards is half changed
    # Wait for it; Ctrl-C ends the wait. RuntimeError where the lock is torn
    cdef int acquire(self) except -1
    cdef void release(self) noexcept
